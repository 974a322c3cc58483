"""A CNN with BatchNorm and dropout on the digits, otherwise like mlp.py."""

from functools import partial

from mlp import Noisy, fields
from torch import nn

from disttrain import Config


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16 * 9, 10),
    )


config = Config(**{**fields, "model": cnn, "train_data": partial(Noisy, (1, 8, 8))})
