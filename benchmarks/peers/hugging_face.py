"""hugging_face.py of docs/text.md with the Trainer of transformers."""

from pydoc_data.topics import topics

from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

LENGTH, VOCAB = 64, 256


def windows(texts):
    tokens = list("\n".join(texts["text"]).encode())
    pieces = [tokens[i : i + LENGTH] for i in range(0, len(tokens) - LENGTH + 1, LENGTH)]
    return {"input_ids": pieces, "labels": pieces}


def train_data():
    texts = Dataset.from_dict({"text": [topics[name] for name in sorted(topics)]})
    return texts.map(windows, batched=True, remove_columns="text").with_format("torch")


def gpt2():
    sizes = {"n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **sizes))


def fit(data, folder):
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        max_steps=60,
        learning_rate=3e-3,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        save_steps=20,
        save_total_limit=3,
        report_to="none",
        seed=0,
    )
    Trainer(gpt2(), arguments, train_dataset=data).train(resume_from_checkpoint=get_last_checkpoint(folder))


if __name__ == "__main__":
    fit(train_data(), "runs/hugging-face")
