"""An MLP with dropout on the digits, augmented from python, numpy and torch: AdamW, a schedule, clipping."""

import random
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from disttrain import Config


class Noisy(Dataset):
    def __init__(self, shape: tuple[int, ...]) -> None:
        # The digits of scikit-learn, read without importing it: the import would take each of many ranks a second.
        (place,) = find_spec("sklearn").submodule_search_locations
        table = np.loadtxt(Path(place) / "datasets" / "data" / "digits.csv.gz", delimiter=",", max_rows=240)
        self.x = torch.tensor(table[:, :-1], dtype=torch.float32).reshape(-1, *shape) / 16
        self.y = torch.tensor(table[:, -1]).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn_like(self.x[i]) + float(np.random.randn()) + random.gauss(0, 1)
        return self.x[i] + 0.1 * noise, self.y[i]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Dropout(0.2), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10))


def schedule(optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=total_steps)


fields = {
    "seed": 3,
    "model": mlp,
    "train_data": partial(Noisy, (64,)),
    "loss": nn.CrossEntropyLoss(),
    "optimizer": partial(torch.optim.AdamW, lr=5e-3, weight_decay=0.05),
    "schedule": schedule,
    "grad_clip_norm": 1.0,
    "global_batch_size": 24,
    "num_slots": 8,
    "max_steps": 30,
    "ledger": {"every_steps": 1},
    "log": {"every_steps": 7, "tensorboard": False},
    "checkpoint": {"every_steps": 10},
}
config = Config(**fields)
