"""Adapters: the network of the digits, frozen, learns whether a digit is odd by small additions to its convolutions.

    python -m disttrain.launch examples/digits.py name=base checkpoint.monitor=accuracy
    python -m disttrain.launch examples/adapters.py

The backbone begins with the best weights of the first run and stays as it is. Only the adapters and the new head are
trained, and only these lie in the checkpoints.
"""

from functools import partial

import digits
import torch
from torch import nn
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy

from disttrain.config import replace


class Adapted(nn.Conv2d):
    """A convolution plus a path of low rank that begins at zero (LoRA); the names of its own weights stay the same."""

    def __init__(self, conv: nn.Conv2d, rank: int) -> None:
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding)
        self.requires_grad_(False)
        self.down = nn.Conv2d(conv.in_channels, rank, conv.kernel_size, padding=conv.padding, bias=False)
        self.up = nn.Conv2d(rank, conv.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.up(self.down(x))


def net(rank: int = 4) -> nn.Module:
    model = digits.net().requires_grad_(False)
    for index, layer in enumerate(model):
        if isinstance(layer, nn.Conv2d):
            model[index] = Adapted(layer, rank)
    model[-1] = nn.Linear(64 * 4 * 4, 2)
    return model


class Parity(Dataset):
    """Digits, with the label 1 for those that are odd."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.data[index]
        return image, label % 2


config = replace(
    digits.config,
    name="adapters",
    model=net,
    init_from={"path": "runs/base@best", "skip": ("*.down.*", "*.up.*", "11.")},
    train_data=lambda: Parity(digits.train_data()),
    valid_data=lambda: Parity(digits.valid_data()),
    optimizer=partial(torch.optim.AdamW, lr=1e-2),
    metrics={"accuracy": partial(MulticlassAccuracy, num_classes=2, average="micro")},
    max_epochs=5,
    checkpoint={"leave_out_frozen": True},
)
