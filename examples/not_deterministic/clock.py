"""Wrong: the model seeds by the clock, so that no two runs begin with the same weights.

`disttrain verify` finds that the runs did not begin with the same state.
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
