"""A small config that gives the same bits in every run. Each of the other files in this folder breaks it in one way.

disttrain verify examples/not_deterministic/sound.py
"""

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset

from disttrain import Config


class Digits(Dataset):
    """Scans with noise, drawn from torch's global generator, which disttrain seeds for each microbatch."""

    def __init__(self) -> None:
        scans = load_digits()
        self.x = torch.tensor(scans.data, dtype=torch.float32) / 16
        self.y = torch.tensor(scans.target)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + self.noise(), self.y[index]

    def noise(self) -> Tensor:
        return 0.1 * torch.randn(64)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))


fields = {
    "model": net,
    "train_data": Digits,
    "loss": nn.CrossEntropyLoss(),
    "optimizer": partial(torch.optim.AdamW, lr=3e-3),
    "global_batch_size": 48,
    "num_slots": 4,
    "max_epochs": 2,
}
config = Config(**fields)
