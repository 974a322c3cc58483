"""Wrong: the model counts its calls in a list that no checkpoint holds, so a resumed run counts anew.

A forward that changed with each call would be refused in the first step, where a slot runs twice. This one changes with
every tenth call alone. `disttrain verify` reports that the loaded data was the same, but not the loss: in the first
step after the checkpoint from which a killed run resumed, or in a later one. A checkpoint does hold a buffer
(`register_buffer`), and every slot of a step begins with the same buffers.
"""

import torch
from sound import fields
from torch import Tensor, nn

from disttrain import Config


class Warming(nn.Module):
    """A model with noise on its hidden units, which fades with every tenth call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        hidden = self.first(x).relu()
        return self.last(hidden + torch.randn_like(hidden) / (1 + self.calls[0] // 10))


config = Config(**{**fields, "model": Warming})
