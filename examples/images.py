"""Images with the usual recipe: shifts, flips, mixup, label smoothing, an average of the weights, a plateau schedule.

    torchrun --standalone --nproc-per-node 2 -m disttrain.launch examples/images.py

The run ends when its accuracy no longer rises, and keeps the checkpoint of its best evaluation.
"""

from functools import partial

import digits
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Dataset, default_collate
from torchmetrics.classification import MulticlassAccuracy

from disttrain import Config

SYMMETRIC = (0, 1, 8)


class RandomFlip(Dataset):
    """Mirrors every second image, at random, of the digits that stay the same digit."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.data[index]
        return image.flip(-1) if label in SYMMETRIC and torch.rand(()) < 0.5 else image, label


def mixup(samples: list, alpha: float = 0.2) -> list[Tensor]:
    """Return a batch in which each image is mixed with another one, and its label with the other's."""
    images, labels = default_collate(samples)
    targets = nn.functional.one_hot(labels, 10).float()
    share = torch.distributions.Beta(alpha, alpha).sample()
    return [share * part + (1 - share) * part.roll(1, 0) for part in (images, targets)]


config = Config(
    name="images",
    seed=7,
    model=digits.net,
    train_data=lambda: RandomFlip(digits.train_data()),
    valid_data=digits.valid_data,
    collate=mixup,
    validate={"collate": default_collate},
    loss=nn.CrossEntropyLoss(label_smoothing=0.1),
    optimizer=partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.01),
    schedule=lambda optimizer, total_steps: ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=2),
    metrics={"accuracy": partial(MulticlassAccuracy, num_classes=10, average="micro")},
    ema={"decay": 0.95},
    checkpoint={"monitor": "accuracy"},
    early_stop={"monitor": "accuracy", "patience": 6},
    global_batch_size=96,
    num_slots=8,
    max_epochs=60,
)
