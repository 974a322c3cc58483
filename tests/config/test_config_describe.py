"""The description of a Config is the same in every process and folder, and differs if the runs would differ."""

import functools
import json
import subprocess
import sys
from collections import OrderedDict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_samples import CFG, adam, data, net, sample, write_cfg
from torch import nn

from disttrain.config import config_hash, describe, load_config


class Colour(Enum):
    RED = 1


class Plain:
    """An object whose repr is its address."""

    def method(self, *_: Any) -> None:
        """Do nothing."""


def value(of: object) -> Any:
    return describe(sample(train_data=partial(data, root=of)))["train_data.root"]


def test_functions_stand_by_name_and_their_keywords_by_dotted_keys() -> None:
    description = describe(sample(model=net, optimizer=partial(adam, lr=3e-4)))
    assert description["model"] == f"{net.__module__}.net"
    assert description["optimizer"] == f"{adam.__module__}.adam"
    assert description["optimizer.lr"] == 3e-4
    assert description["metrics.accuracy.num_classes"] == 10
    assert description["checkpoint.keep"] == 3
    assert list(description)[:3] == ["name", "seed", "model"]


def test_a_class_of_torch_stands_by_the_name_it_is_imported_by() -> None:
    description = describe(sample(optimizer=partial(torch.optim.AdamW, lr=0.1), metrics={}))
    assert description["optimizer"] == "torch.optim.adamw.AdamW"
    assert description["metrics"] == {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((1, 2.5, "a", None, True), [1, 2.5, "a", None, True]),
        ({3, 1, 2}, [1, 2, 3]),
        (float("inf"), "inf"),
        (Path("/data/x"), "/data/x"),
        (torch.float32, "torch.float32"),
        (np.float64(0.5), 0.5),
        (np.int64(3), 3),
        (nn.ReLU, "torch.nn.modules.activation.ReLU"),
        ([partial(adam, 1, lr=0.5, betas=(1, 2))], [f"{adam.__module__}.adam(1, betas=[1,2], lr=0.5)"]),
        (Colour.RED, f"{__name__}.Colour.RED"),
        (Plain(), f"{__name__}.Plain object"),
        (Plain().method, f"{__name__}.Plain.method"),
        ([functools.lru_cache(net)], [f"{net.__module__}.net"]),
        (OrderedDict([("a.b", 1)]), {"a.b": 1}),
    ],
)
def test_values_stand_without_addresses(given: object, expected: object) -> None:
    assert value(given) == expected


def test_a_partial_inside_a_partial_has_dotted_keys_too() -> None:
    description = describe(sample(model=partial(net, act=partial(adam, lr=0.1), untyped={"deep": {"er": 1}})))
    assert description["model.act"] == f"{adam.__module__}.adam"
    assert (description["model.act.lr"], description["model.untyped.deep.er"]) == (0.1, 1)


def test_a_loss_stands_with_its_settings_and_weights() -> None:
    plain = describe(sample(loss=nn.CrossEntropyLoss()))
    assert (plain["loss"], plain["loss.label_smoothing"]) == ("CrossEntropyLoss()", 0.0)
    others = [nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))]
    assert len({config_hash(sample(loss=loss)) for loss in [nn.CrossEntropyLoss(), *others]}) == 3
    assert config_hash(sample(loss=nn.CrossEntropyLoss())) == config_hash(sample(loss=nn.CrossEntropyLoss()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_tensors_stand_by_their_content(dtype: torch.dtype) -> None:
    ones, zeros = torch.ones(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    assert value(ones) == value(ones.t().contiguous().t()) != value(zeros)
    assert value(torch.ones((), dtype=dtype)) != value(ones)
    assert value(np.ones(2)) != value(np.zeros(2))


def test_json_holds_a_description() -> None:
    description = describe(sample(handlers=[lambda trainer, run: None, partial(net, float("nan"))]))
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    assert " at 0x" not in str(description)


def test_the_hash_moves_with_every_field_and_only_with_them() -> None:
    same = config_hash(sample())
    assert same == config_hash(sample())
    changes: list[dict[str, Any]] = [
        {"seed": 1},
        {"model": partial(net, width=3)},
        {"optimizer": partial(adam, lr=0.02)},
        {"checkpoint": {"keep": 4}},
        {"valid_data": data},
    ]
    assert len({same, *(config_hash(sample(**change)) for change in changes)}) == len(changes) + 1


def test_it_is_the_same_in_another_process_and_folder_and_under_another_name(tmp_path: Path) -> None:
    text = CFG.replace("data(root=", "data(tags=frozenset('abcdefgh'), root=") + (
        "from disttrain.config import replace\n"
        "class Thing: pass\n"
        "config = replace(config, name='same', train_data=partial(data, tags=set('abcdefgh'), root=Thing()))\n"
    )
    here = load_config(write_cfg(tmp_path / "here", "here_cfg.py", text), ["optimizer.lr=0.25"])
    there = write_cfg(tmp_path / "there", "there_cfg.py", text)
    program = (
        "import sys, json; from disttrain.config import *; c = load_config(sys.argv[1], ['optimizer.lr=0.25']);"
        "print(json.dumps([describe(c), config_hash(c)]))"
    )
    root = Path(__import__("disttrain").__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, str(there)],
        capture_output=True,
        text=True,
        cwd=root,
        check=True,
        env={"PYTHONHASHSEED": "3"},
    )
    assert json.loads(done.stdout) == [describe(here), config_hash(here)]
    assert describe(here)["train_data.root"] == "cfg.Thing object"


def test_a_config_of_the_main_program_is_described_alike() -> None:
    def build() -> None:
        raise AssertionError("describing builds nothing")

    build.__module__, build.__qualname__ = "__main__", "build"
    assert describe(sample(model=build))["model"] == "cfg.build"
