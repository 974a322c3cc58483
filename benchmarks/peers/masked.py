"""examples/masked.py with the Trainer of transformers."""

import torch
from paragraphs import PAD, VOCAB, WIDTH, Encoder, padded, paragraphs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

HIDDEN = 1


def masked(samples: list[dict]) -> dict[str, Tensor]:
    tokens = padded(samples)["input_ids"]
    chosen = (torch.rand(tokens.shape) < 0.15) & (tokens != PAD)
    return {"input_ids": tokens.masked_fill(chosen, HIDDEN), "labels": tokens.masked_fill(~chosen, -100)}


class Masked(nn.Module):
    accepts_loss_kwargs = True

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.encoder(input_ids))
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return {
            "loss": cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count,
            "logits": logits,
        }


if __name__ == "__main__":
    arguments = TrainingArguments(
        "runs/masked",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=8,
        num_train_epochs=8,
        learning_rate=2e-3,
        weight_decay=0.01,
        lr_scheduler_type="constant",
        train_sampling_strategy="group_by_length",
        prediction_loss_only=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=3,
        report_to="none",
        seed=2,
    )
    trainer = Trainer(
        Masked(),
        arguments,
        data_collator=masked,
        train_dataset=paragraphs(held_out=False),
        eval_dataset=paragraphs(held_out=True),
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint("runs/masked"))
