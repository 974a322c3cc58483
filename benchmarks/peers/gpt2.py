"""examples/gpt2.py with the Trainer of transformers."""

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

LENGTH, VOCAB, HELD_OUT = 64, 256, 500


class Windows(Dataset):
    def __init__(self) -> None:
        text = "\n".join(topics[name] for name in sorted(topics)).encode()
        self.tokens = torch.tensor(list(text)).unfold(0, LENGTH, LENGTH)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def train_data() -> Dataset:
    data = Windows()
    return Subset(data, range(HELD_OUT, len(data)))


def valid_data() -> Dataset:
    return Subset(Windows(), range(HELD_OUT))


def gpt2() -> nn.Module:
    sizes = {"n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **sizes))


class NamedDecay(Trainer):
    """Leaves embeddings without weight decay too; the Trainer's own groups leave biases and norms without."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [
            name for name in super().get_decay_parameter_names(model) if not name.endswith(("wte.weight", "wpe.weight"))
        ]


if __name__ == "__main__":
    arguments = TrainingArguments(
        "runs/gpt2",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        max_steps=400,
        learning_rate=3e-3,
        weight_decay=0.1,
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        max_grad_norm=1.0,
        bf16=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=3,
        report_to="none",
        seed=0,
    )
    trainer = NamedDecay(gpt2(), arguments, train_dataset=train_data(), eval_dataset=valid_data())
    trainer.train(resume_from_checkpoint=get_last_checkpoint("runs/gpt2"))
