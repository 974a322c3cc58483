"""Wrong: the model counts its calls in an attribute, which no checkpoint holds; a resumed run counts anew.

`disttrain verify` finds that what was loaded was the same, but not the loss: in the slots that are not a rank's first,
and in the first step after the checkpoint that a killed run went on from. A buffer (`register_buffer`) would be kept;
every slot of a step begins with the same.
"""

import torch
from sound import fields
from torch import Tensor, nn

from disttrain import Config


class Warming(nn.Module):
    """Noise on the hidden units that fades with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.first(x).relu()
        return self.last(hidden + torch.randn_like(hidden) / self.calls)


config = Config(**{**fields, "model": Warming})
