"""A Run is complete when it is built; it keeps further objects, and its position survives a checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import small_run
from torch import nn

from disttrain.errors import CheckpointError, ConfigError
from disttrain.run.state import Run


class Counter:
    """A small object with a state."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_a_run_is_built_by_keywords_and_every_part_is_required() -> None:
    fields = dataclasses.fields(Run)
    assert all(field.kw_only for field in fields)
    optional = [
        field.name
        for field in fields
        if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    ]
    assert optional == [
        "attached",
        "kept",
        "samples",
        "settings",
        "begin",
        "frozen",
        "pretrained",
        "evaluated",
        "evaluation_due",
        "terminated",
        "training",
    ]  # values that change while the run trains


def test_handlers_get_the_complete_run(tmp_path: Path) -> None:
    values_by_call: list[dict[str, Any]] = []

    def handler(trainer: object, run: Run) -> None:
        assert run.trainer is trainer
        values_by_call.append({field.name: getattr(run, field.name) for field in dataclasses.fields(run)})

    run = small_run(
        tmp_path,
        handlers=[handler],
        checkpoint={"monitor": "loss"},
        schedule=constant,
        ema={"decay": 0.9},
        early_stop={"monitor": "loss"},
        audit={"every_steps": 5},
    )
    [values] = values_by_call
    started_later = ("attached", "kept", "samples", "settings", "begin", "frozen", "pretrained", "evaluation_due")
    started_later += ("terminated", "training")
    parts = [name for name in values if name not in (*started_later, "taken")]  # init_from takes no weights here
    assert [name for name in parts if values[name] is None] == []
    assert all(getattr(run, name) is values[name] for name in parts)


def constant(optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


@pytest.mark.parametrize("kept", [Counter(), nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)])
def test_keep_takes_objects_modules_and_optimizers_and_returns_them(tmp_path: Path, kept: Any) -> None:
    run = small_run(tmp_path)
    assert run.keep("it", kept) is kept
    assert run.kept == {"it": kept}


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("a.b", Counter(), "expected a name without dots, got 'a.b'"),
        ("", Counter(), "expected a name without dots, got ''"),
        ("taken", Counter(), "this name is taken"),
        ("it", object(), "got object without state_dict and load_state_dict"),
        ("it", {"weights": torch.ones(1)}, "got dict without state_dict and load_state_dict"),
    ],
)
def test_keep_refuses_bad_names_and_objects(tmp_path: Path, name: str, kept: Any, message: str) -> None:
    run = small_run(tmp_path)
    run.keep("taken", Counter())
    with pytest.raises(ConfigError) as caught:
        run.keep(name, kept)
    assert message in str(caught.value)
    assert list(run.kept) == ["taken"]


def test_keep_is_refused_once_the_run_trains(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    run.training = True
    with pytest.raises(ConfigError, match="expected a call before the first step"):
        run.keep("late", Counter())


def test_the_state_has_every_tensor_and_every_kept_value(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    run.keep("counter", Counter())
    run.keep("layer", nn.Linear(2, 2))
    names = set(run.state_tensors())
    assert {"model.0.weight", "model.1.running_mean", "kept.counter.count", "kept.layer.weight"} <= names


def test_the_position_of_a_checkpoint_is_restored(tmp_path: Path) -> None:
    run = small_run(tmp_path, {3: "the loss became nan"}, on_nan="rollback", spike_factor=9.0)
    assert run.bad_steps is not None
    run.bad_steps.recent.extend([1.0, 2.0])
    run.updates.num_skipped, run.evaluation_due = 2, True
    again = small_run(tmp_path, on_nan="rollback", spike_factor=9.0)
    again.load_position(run.position())
    assert again.bad_steps is not None
    assert (again.skipped_steps, again.evaluation_due, again.left_out) == (2, True, {3: "the loss became nan"})
    assert list(again.bad_steps.recent) == [1.0, 2.0]
    assert again.position() == run.position()


@pytest.mark.parametrize(("changes", "steps"), [({"max_epochs": 3}, 12), ({"max_epochs": None, "max_steps": 7}, 7)])
def test_total_steps(tmp_path: Path, changes: dict[str, Any], steps: int) -> None:
    assert small_run(tmp_path, **changes).total_steps == steps  # 32 samples, 8 per step


def test_the_manifest_gets_seed_slots_and_position(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    info = run.checkpoint_info()
    assert (info.seed, info.num_slots, info.position["samples_seen"]) == (5, 2, 0)


@pytest.mark.parametrize(
    "position",
    [
        {"left_out": [3]},
        {"left_out": {"three": "bad"}},
        {"left_out": {"9" * 5000: "bad"}},
        {"recent_losses": {"a": 1}},
        {"recent_losses": ["1"]},
        {"recent_losses": [None]},
    ],
)
def test_a_position_that_no_run_wrote_is_one_clear_error(tmp_path: Path, position: dict[str, Any]) -> None:
    [name] = position
    with pytest.raises(
        CheckpointError, match=f"^the checkpoint's position has {name}=.*, which no run wrote"
    ) as caught:
        small_run(tmp_path).load_position(position)
    assert "\n" not in str(caught.value)
