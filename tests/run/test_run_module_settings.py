"""Settings of modules that a handler changes come back when a run resumes; what nobody changed is not saved."""

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.errors import CheckpointError
from disttrain.run.module_settings import ModuleSettings


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 1)))


def change(module: Any) -> None:
    module[1].p = 0.1
    module[2].momentum = None
    module[3][0].extra = "a text"
    module.beta = math.inf
    module.count = 3


def test_what_was_changed_comes_back_in_another_process() -> None:
    first, second = net(), net()
    settings, others = ModuleSettings(first), ModuleSettings(second)
    change(first)
    others.load(json.loads(json.dumps(settings.changed(), allow_nan=False)))
    assert others.changed() == settings.changed()
    assert (second[1].p, second[2].momentum, second[3][0].extra) == (0.1, None, "a text")  # type: ignore[index]
    assert (second.beta, second.count) == (math.inf, 3)


def test_the_mode_and_tensors_are_left_out() -> None:
    module = net()
    settings = ModuleSettings(module)
    module.eval()
    module.register_forward_hook(lambda *_: None)
    module.last = torch.ones(2)
    nn.init.zeros_(module.get_parameter("0.weight"))
    assert settings.changed() == {}


@pytest.mark.parametrize(("before", "after"), [(1, True), (1, 1.0), (0.0, -0.0), (None, False), ("1", 1)])
def test_equal_values_of_another_kind_are_a_change(before: Any, after: Any) -> None:
    module: Any = net()
    module.value = before
    settings = ModuleSettings(module)
    module.value = after
    (name,) = settings.changed()
    assert name == ":value"
    restored: Any = net()
    ModuleSettings(restored).load(settings.changed())
    assert repr(restored.value) == repr(after)


def test_a_setting_that_is_changed_back_is_no_change() -> None:
    module: Any = net()
    settings = ModuleSettings(module)
    change(module)
    module[1].p = 0.5
    assert set(settings.changed()) == {"2:momentum", "3.0:extra", ":beta", ":count"}


@pytest.mark.parametrize(
    "damaged",
    [
        [],
        {"gone:p": 1},
        {"1:p": [1]},
        {"1:p": {"float": "x"}},
        {"1:p": {}},
        {"1:forward": 3},
        {"0:weight": 1},
    ],
)
def test_what_no_run_wrote_is_refused(damaged: Any) -> None:
    with pytest.raises(CheckpointError, match=r"module_settings=.*which no run of this model wrote"):
        ModuleSettings(net()).load(damaged)
