"""The slots of a replayed step: samples, sources, weights, losses, values and gradients; one slot alone."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from replaying import embed, replayed, replayed_from, spread, weighted
from small_run import console, points, small_config, trained
from test_run_several_updates import FIELDS
from torch import nn

from disttrain.checkpoint import load
from disttrain.data import Mixture
from disttrain.run.directory import RunDirectory
from disttrain.run.replay_start import starts_before

pytestmark = pytest.mark.usefixtures("torch_settings")

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights and values": {"loss": None, "forward": weighted, "weight": lambda batch: len(batch[0])},
    "global loss": {"loss": None, "forward": embed, "global_loss": spread},
    "fp16": {"precision": "fp16"},
}


def test_the_slots_of_a_step(tmp_path: Path) -> None:
    """Losses, weights, values and norms of the slots make those of the step; a mixture names its sources."""
    sources = {"a": points(20), "b": points(12)}
    fields: dict[str, Any] = {
        **KINDS["weights and values"],
        "train_data": lambda: sources,
        "order": partial(Mixture, shares={"a": 1, "b": 2}),
    }
    trained(tmp_path, **fields)
    found = replayed(tmp_path, 3, small_config(**fields))
    assert [each.weight for each in found.slots] == [4, 4]
    assert sum(each.loss or 0.0 for each in found.slots) / 2 == float.fromhex(found.line["loss"])
    for each in found.slots:
        assert each.indices is not None
        assert each.sources == ["a" if index < 20 else "b" for index in each.indices]
        y = torch.stack([(*sources["a"], *sources["b"])[index][1] for index in each.indices])
        assert each.values["share"] == [pytest.approx(float(y.sum())), 3.0]
        assert each.grad_norm is not None
        assert each.grad_norm > 0


def test_the_gradient_of_a_slot_is_that_of_its_own_loss(tmp_path: Path) -> None:
    """Also in fp16, whose gradients are scaled."""
    for precision in ("fp32", "fp16"):
        folder = tmp_path / precision
        fields: dict[str, Any] = {"precision": precision, "model": partial(nn.Linear, 3, 1)}
        trained(folder, checkpoint={"every_steps": 1}, **fields)
        found = replayed(folder, 1, small_config(**fields))
        assert found.line["step"] == 1
        directory = RunDirectory(folder / "small")
        (start,) = (s for s in starts_before(directory, [], 8, console()) if s.step == 7)
        last = replayed_from(folder, [start], 8, small_config(**fields))
        state = torch.nn.Linear(3, 1)
        loaded = load(directory.checkpoints / start.name).state["model"]
        state.load_state_dict(loaded)
        for slot in last.slots:
            assert slot.indices is not None
            x, y = (torch.stack(each) for each in zip(*(points()[index] for index in slot.indices), strict=True))
            state.zero_grad()
            nn.MSELoss()(state(x), y).backward()
            norm = torch.cat([parameter.grad.flatten() for parameter in state.parameters()]).norm()  # type: ignore[union-attr]
            assert slot.grad_norm == pytest.approx(float(norm), rel=1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_one_slot_alone(kind: str, tmp_path: Path) -> None:
    """It has the loss and the gradient that it has in the whole step, also in the first step of a process."""
    fields: dict[str, Any] = {"checkpoint": {"every_steps": 4}, "ledger": {"every_steps": 1}, **KINDS[kind]}
    trained(tmp_path, **fields)
    for step in (5, 7):
        whole = replayed(tmp_path, step, small_config(**fields))
        for slot in (0, 1):
            (alone,) = replayed(tmp_path, step, small_config(**fields), only=slot).slots
            assert alone == whole.slots[slot]


@pytest.mark.parametrize("only", [None, 1])
def test_the_slots_of_several_updates_are_named_by_them(tmp_path: Path, only: int | None) -> None:
    trained(tmp_path, **FIELDS, checkpoint={"every_steps": 2}, ledger={"every_steps": 1})
    lines = [json.loads(line) for line in (tmp_path / "small/metrics/train.jsonl").read_text().splitlines()]
    for step, names in ((4, ["b"]), (5, ["b", "a"])):  # the second one is due in every other step
        found = replayed(tmp_path, step, small_config(**FIELDS), only=only)
        slots = [0, 1] if only is None else [only]
        assert [(each.update, each.slot) for each in found.slots] == [(name, slot) for name in names for slot in slots]
        for name in names if only is None else ():
            losses = [each.loss or 0.0 for each in found.slots if each.update == name]
            assert sum(losses) / 2 == lines[step - 1][f"{name}/loss"]
