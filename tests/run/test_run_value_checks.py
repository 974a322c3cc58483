"""The values that a forward returns are checked by name and form, and cut off from their graphs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import small_config, trained
from torch import nn

from disttrain.errors import ConfigError
from disttrain.run.value_checks import values_of


def forward(model: nn.Module, batch: Any) -> Any:
    loss = nn.functional.mse_loss(model(batch[0]), batch[1])
    return loss, None, {"mse": loss}


CONFIG = small_config(loss=None, forward=forward, metrics={"accuracy": lambda: None}, train_metrics={"error": list})


def test_numbers_and_pairs_pass_without_their_graphs() -> None:
    loss = torch.ones(1, requires_grad=True) * 3
    passed = values_of(CONFIG)(
        {"ce": loss, "pair": [loss.sum(), 4], "numpy": np.float32(0.5), "flag": True, "loss/aux": torch.tensor(2)}
    )
    assert isinstance(passed["ce"], torch.Tensor)
    assert (passed["ce"].shape, passed["ce"].requires_grad, passed["ce"].item()) == ((), False, 3.0)
    assert isinstance(passed["pair"], tuple)
    assert isinstance(passed["pair"][0], torch.Tensor)
    assert not passed["pair"][0].requires_grad
    assert passed["pair"][1] == 4.0
    assert {name: passed[name] for name in ("numpy", "flag", "loss/aux")} == {"numpy": 0.5, "flag": 1.0, "loss/aux": 2}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.ones(2), r"with a dict of name: number as values, got float32\[2\]"),
        (None, "with a dict of name: number as values, got NoneType"),
        ({"ce": torch.ones(8)}, r"the value 'ce' to be one number .*, got float32\[8\]; reduce it, by .mean\(\)"),
        ({"ce": torch.ones((), dtype=torch.complex64)}, r"the value 'ce' .*, got complex64\[\]"),
        ({"ce": None}, "the value 'ce' .*, got NoneType; return a mean over the batch"),
        ({"ce": (1.0, 2.0, 3.0)}, "the value 'ce' .*, got a tuple of 3"),
        ({"ce": (torch.ones(3), 3)}, r"the value 'ce' .*, got float32\[3\]"),
        ({3: 1.0}, "names of values without '.', '=' and spaces, such as 'ce', got 3"),
        ({"a b": 1.0}, "names of values without '.', '=' and spaces, such as 'ce', got 'a b'"),
        ({"loss": 1.0}, "names of their own, got 'loss', which is that of a part of every line"),
        ({"grad_norm": 1.0}, "names of their own, got 'grad_norm', which is that of a part of every line"),
        ({"accuracy": 1.0}, "names of their own, got 'accuracy', which is that of a metric"),
        ({"error": 1.0}, "names of their own, got 'error', which is that of a metric"),
    ],
)
def test_what_is_no_value_is_named(values: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^forward \(.*value_checks.py:\d+\): expected .*{words}"):
        values_of(CONFIG)(values)


class Sharded:
    """As a parameter of which each rank holds a part."""

    def to_local(self) -> torch.Tensor:
        return torch.ones(1)


def test_a_part_of_a_parameter_is_no_value() -> None:
    with pytest.raises(ConfigError, match="the value 'bias' is made of a parameter of which each rank holds a part"):
        values_of(CONFIG)({"bias": Sharded()})


def test_a_run_checks_them_in_its_first_step(tmp_path: Path) -> None:
    def wrong(model: nn.Module, batch: Any) -> Any:
        loss, outputs, _ = forward(model, batch)
        return loss, outputs, {"rows": batch[0].sum(1)}

    with pytest.raises(ConfigError, match=r"^forward .*: expected the value 'rows' .*, got float32\[4\]"):
        trained(tmp_path, loss=None, forward=wrong)
