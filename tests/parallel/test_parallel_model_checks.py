"""Models whose gradients cannot have the same bits on any number of ranks are refused before the first step."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.errors import ConfigError
from disttrain.parallel.model_checks import check_model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)), r"SyncBatchNorm \(1\) normalises .* use BatchNorm"),
        (nn.Sequential(nn.Embedding(4, 2, sparse=True)), r"Embedding \(0\) has sparse gradients.*use sparse=False"),
        (nn.Sequential(nn.Embedding(4, 2, max_norm=1.0)), r"Embedding \(0\) has max_norm=1.0: its forward changes its"),
        (nn.Flatten(), "Flatten has no parameter to train"),
        (nn.Linear(2, 2).requires_grad_(False), "Linear has no parameter to train"),
        (nn.LazyLinear(2), "the parameter weight has no shape yet; run one forward"),
        (nn.Linear(2, 2, device="meta"), "expected the model on cpu, got the parameter weight on meta"),
    ],
)
def test_models_that_cannot_give_the_same_bits_are_refused(model: nn.Module, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_model(model, torch.device("cpu"))


def test_a_model_in_a_wrapper_is_refused() -> None:
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)  # a real one needs a process group
    nn.Module.__init__(wrapped)
    wrapped.module = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="expected a bare model, got DistributedDataParallel"):
        check_model(wrapped, None)


def test_bare_models_are_taken() -> None:
    check_model(nn.Sequential(nn.Embedding(4, 2), nn.BatchNorm1d(2)), torch.device("cpu"))
    check_model(nn.Linear(1, 1), None)
