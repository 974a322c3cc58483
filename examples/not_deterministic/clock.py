"""Wrong: the model is seeded by the clock, so no two runs begin with the same weights.

`disttrain verify` reports that the runs did not begin with the same state.
"""

import time

import torch
from sound import fields, net
from torch import nn

from disttrain import Config


def clock() -> nn.Module:
    torch.manual_seed(time.time_ns())
    return net()


config = Config(**{**fields, "model": clock})
