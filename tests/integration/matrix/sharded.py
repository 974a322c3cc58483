"""A config for sharding: BatchNorm, sizes that no number of ranks divides, and 7 batches of validation."""

from mlp import Noisy, fields
from torch import nn
from torch.utils.data import Subset

from disttrain import Config


def net() -> nn.Module:
    first = nn.Sequential(nn.Linear(64, 33), nn.BatchNorm1d(33), nn.GELU(), nn.Dropout(0.2))
    return nn.Sequential(first, nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 10))


def valid_data() -> Subset:
    return Subset(Noisy((64,)), range(20))


config = Config(**{**fields, "model": net, "valid_data": valid_data, "validate": {"every_steps": 5}})
