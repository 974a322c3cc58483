"""Settings that several updates exclude, and updates that are none: each problem is named in its words."""

from functools import partial
from typing import Any

import pytest
import torch
from test_config_updates import config, forward, parameters
from torch import nn

from disttrain import Update
from disttrain.errors import ConfigError

U = partial(Update, parameters=parameters, forward=forward, optimizer=torch.optim.SGD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": []}, "optimizer: missing; expected (parameters) -> Optimizer."),
        ({"updates": [U("d"), U("d")]}, "with a name of its own for each, got 'd' twice."),
        ({"updates": [3]}, 'updates: expected a list such as [Update("d", ...), Update("g", ...)], got 3.'),
        ({"updates": U("d")}, ", got an Update."),
        ({"updates": [U("a.b")]}, "updates: expected names without '.', '=', '/' and spaces, such as 'd', got 'a.b'."),
        (
            {"updates": [U("d", every=2)]},
            "updates: expected one that is due in every step, got every=2 or more",
        ),
        ({"optimizer": torch.optim.SGD}, "optimizer: expected None with updates, each of which has its own"),
        ({"schedule": lambda o, n: None}, "write Update(NAME, ..., schedule=...)."),
        ({"grad_clip_norm": 1.0}, "grad_clip_norm: expected None with updates, each of which has its own, got 1.0"),
        ({"loss": nn.MSELoss()}, "loss: expected None with updates and without valid_data, got"),
        ({"valid_data": lambda: None}, "loss, forward: expected one of the two, got neither"),
        ({"global_loss": lambda e: e}, "global_loss: expected None with updates, together with which it has not been"),
        ({"train_metrics": {"a": lambda: None}}, "train_metrics: expected none with updates"),
        ({"compile": True}, "compile: expected False with updates"),
        ({"audit": {"every_steps": 9}}, "audit.every_steps: expected 0 with updates"),
        ({"precision": "apex"}, 'precision: expected "fp32", "bf16" or "fp16" with updates'),
        ({"fsdp_gather": "module"}, 'fsdp_gather: expected "step" with updates'),
        ({"updates": [U("d", parameters=lambda: 1)]}, "updates.d.parameters: expected (model) -> parameters, got"),
        (
            {"updates": [U("d", forward=lambda batch: 1)]},
            "updates.d.forward: expected (model, batch) -> (loss, outputs",
        ),
    ],
)
def test_what_does_not_go_together_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert message in str(caught.value)
