"""Handwritten digits: 1,797 real scans of 8x8 pixels, a small convolutional network, random shifts.

    torchrun --standalone --nproc-per-node 2 -m disttrain.launch examples/digits.py

Copy this file to begin your own. It names functions that build the parts of a run, so reading it builds nothing.
"""

from functools import partial

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from disttrain import Config

NUM_HELD_OUT = 360


class RandomShift(Dataset):
    """Moves each image by up to one pixel, at random.

    It draws from torch's global generator, as any augmentation does. disttrain seeds that generator for each microbatch
    by its position in the run, so an interrupted run gets the same pixels.
    """

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.data[index]
        down, right = torch.randint(-1, 2, (2,)).tolist()
        return torch.roll(image, (down, right), dims=(1, 2)), label


def digits() -> list[torch.Tensor]:
    """Return the training images, the images that are held out, and the labels of both."""
    scans = load_digits()
    images = torch.tensor(scans.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8] in 0..1
    labels = torch.tensor(scans.target)
    return train_test_split(images, labels, test_size=NUM_HELD_OUT, random_state=0, stratify=labels)


def train_data() -> Dataset:
    images, _, labels, _ = digits()
    return RandomShift(TensorDataset(images, labels))


def valid_data() -> Dataset:
    _, images, _, labels = digits()
    return TensorDataset(images, labels)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 10),
    )


config = Config(
    name="digits",
    seed=7,
    model=net,
    train_data=train_data,
    valid_data=valid_data,
    loss=nn.CrossEntropyLoss(),
    optimizer=partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.01),
    schedule=lambda optimizer, total_steps: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=optimizer.defaults["lr"], total_steps=total_steps
    ),
    metrics={"accuracy": partial(MulticlassAccuracy, num_classes=10, average="micro")},
    global_batch_size=96,
    num_slots=8,
    max_epochs=20,
)
