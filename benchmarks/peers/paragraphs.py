"""examples/paragraphs.py with the Trainer of transformers."""

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction, get_last_checkpoint

NUM_TOPICS, LONGEST, WIDTH, VOCAB = 10, 200, 64, 256
PAD = 0


def paragraphs(held_out: bool) -> list[dict]:
    longest = sorted(topics, key=lambda name: (len(topics[name]), name))[-NUM_TOPICS:]
    texts = [(text, label) for label, name in enumerate(longest) for text in topics[name].split("\n\n") if text.strip()]
    cut = [{"input_ids": list(text.encode())[:LONGEST], "labels": label} for text, label in texts]
    return [sample for i, sample in enumerate(cut) if (i % 10 == 0) == held_out]


def padded(samples: list[dict]) -> dict[str, Tensor]:
    texts = [torch.tensor(sample["input_ids"]) for sample in samples]
    labels = torch.tensor([sample["labels"] for sample in samples])
    return {"input_ids": pad_sequence(texts, batch_first=True, padding_value=PAD), "labels": labels}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LONGEST, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.blocks(self.tokens(tokens) + places, src_key_padding_mask=tokens == PAD)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(WIDTH, NUM_TOPICS)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        real = (input_ids != PAD).unsqueeze(-1)
        logits = self.head((self.encoder(input_ids) * real).sum(1) / real.sum(1))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean().item()}


if __name__ == "__main__":
    arguments = TrainingArguments(
        "runs/paragraphs",
        per_device_train_batch_size=64,
        num_train_epochs=8,
        learning_rate=2e-3,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=3,
        report_to="none",
        seed=2,
    )
    trainer = Trainer(
        Classifier(),
        arguments,
        data_collator=padded,
        train_dataset=paragraphs(held_out=False),
        eval_dataset=paragraphs(held_out=True),
        compute_metrics=accuracy,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint("runs/paragraphs"))
