"""The line of a field's function, or of its keyword in the cfg.py."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import small_config
from torch import nn

from disttrain.config import load_config
from disttrain.run.field_places import code_of, field_place


def plain(x: Any) -> Any:
    return x


class Made(nn.Module):
    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Any) -> Any:
        return x


class Called:
    def __call__(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (plain, plain.__code__),
        (partial(partial(plain)), plain.__code__),
        (Made, Made.__init__.__code__),
        (Made(), Made.forward.__code__),
        (Called(), Called.__call__.__code__),
        (Called().__call__, Called.__call__.__code__),
        (len, None),
        (None, None),
        (5, None),
    ],
)
def test_the_code_that_a_call_runs(function: Any, code: Any) -> None:
    assert code_of(function) is code


def test_a_function_of_the_user_has_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    config = small_config(collate=plain)
    assert field_place(config, "collate") == f"collate (test_run_field_places.py:{plain.__code__.co_firstlineno})"


CFG = """
from torch import nn, optim
from disttrain import Config
config = Config(
    model=nn.Identity, train_data=list, max_epochs=1, global_batch_size=8,
    loss=nn.MSELoss(), optimizer=optim.SGD,
)
"""


def test_what_a_library_defines_has_the_line_of_the_keyword(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("placed_cfg.py").write_text(CFG)
    config = load_config(Path("placed_cfg.py"))
    assert field_place(config, "loss") == "loss (placed_cfg.py:6)"
    assert field_place(config, "model") == "model (placed_cfg.py:5)"
    assert field_place(config, "schedule") == "schedule"  # not set


def test_without_a_file_the_field_alone_is_named() -> None:
    assert field_place(small_config(optimizer=torch.optim.SGD), "optimizer") == "optimizer"
