"""The tensor of this run that corresponds to a tensor of a checkpoint, by path and shape."""

from typing import Any

import torch
from torch import nn

from disttrain.parallel.counterparts import Counterparts, tensors_by_path


class Average:
    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, Any]:
        return {"of": [self.tensors, 0.5]}


def test_each_path_has_its_counterpart() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    first, second = model[0].weight, model[1].weight
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    average = Average(weight=torch.zeros(2, 2))
    other = torch.optim.SGD([first], lr=0.1)
    counterparts = Counterparts({"model": model}, optimizer, {"average": average, "other": other})
    assert counterparts.of("model.0.weight", (3, 4)) is first
    assert counterparts.of("optimizer.state.0.momentum_buffer", (4, 3)) is second
    assert counterparts.of("kept.other.state.0.momentum_buffer", (3, 4)) is first
    assert counterparts.of("kept.average.of.0.weight", (2, 2)) is average.tensors["weight"]
    assert counterparts.of("kept.average.later.1.weight", (4, 3)) is second  # the average has no such tensor yet
    assert counterparts.of("kept.average.later.count", ()) is None
    assert counterparts.of("model.0.weight", (4, 3)) is None  # another shape
    assert counterparts.of("optimizer.state.7.momentum_buffer", (4, 3)) is None


def test_a_kept_tensor_named_after_a_part_has_the_parameter_of_that_part() -> None:
    model, loss = nn.Linear(4, 3), nn.Linear(4, 3)
    sgd = torch.optim.SGD(model.parameters())
    counterparts = Counterparts({"model": model, "loss": loss}, sgd, {"average": Average()})
    assert counterparts.of("kept.average.loss.weight", (3, 4)) is loss.weight
    assert counterparts.of("kept.average.model.weight", (3, 4)) is model.weight
    assert counterparts.of("kept.average.weight", (3, 4)) is model.weight


def test_paths_are_those_of_a_checkpoint() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert list(tensors_by_path({"a": [one, {"b": (two,)}], 3: None}, "kept.x")) == ["kept.x.a.0", "kept.x.a.1.b.0"]
