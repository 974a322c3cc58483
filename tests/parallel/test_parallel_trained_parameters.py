"""The parameters that a run trains, in the model's order, and the one warning about those that no slot uses."""

import logging

import pytest
from torch import nn

from disttrain.parallel.trained_parameters import TrainedParameters


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1))
    model[1].requires_grad_(False)
    return model


def test_frozen_parameters_are_left_out() -> None:
    model = partly_frozen()
    trained = TrainedParameters(model)
    assert trained.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(model.get_parameter(n) is p for n, p in zip(trained.names, trained.tensors, strict=True))


def test_a_tied_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert TrainedParameters(model).names == ["0.weight"]


def test_unused_parameters_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    trained = TrainedParameters(partly_frozen())
    with caplog.at_level(logging.WARNING):
        trained.warn_of_unused(set(), iteration=1, rank=0)
        assert caplog.records == []
        trained.warn_of_unused({3, 0}, iteration=2, rank=1)
        trained.warn_of_unused({1}, iteration=3, rank=1)
    [record] = caplog.records
    assert record.getMessage().startswith("step 2: no slot of rank 1 used the parameters 0.weight, 2.bias.")
