"""Handwritten digits, without weight decay on biases and norms."""

from functools import partial

import torch
from digits import config as digits

from disttrain import parameter_groups
from disttrain.config import replace


def adamw(model, lr=2e-3, weight_decay=0.1):
    return torch.optim.AdamW(parameter_groups(model, weight_decay=weight_decay), lr=lr)


config = replace(digits, name="groups", optimizer=partial(adamw, lr=1e-3))
