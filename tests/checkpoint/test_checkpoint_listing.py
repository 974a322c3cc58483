"""Every checkpoint is listed with its verdict, and a plan of removals never takes the newest good one or the best."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import marked
from checkpoint_strangers import victim, victim_in_two
from hypothesis import given
from hypothesis import strategies as st

from disttrain.checkpoint import (
    BestStep,
    CheckpointInfo,
    FileRecord,
    ListedCheckpoint,
    Manifest,
    best_in,
    best_of,
    checkpoint_name,
    inspect,
    is_anchor,
    load_newest,
    plan_prune,
    save,
    survey,
    tensors_of,
    verify,
)
from disttrain.errors import CheckpointError

RECORD = FileRecord(size_bytes=1, sha256="0" * 64)


def test_all_are_listed_in_order_with_their_states(tmp_path: Path) -> None:
    assert survey(tmp_path / "absent") == []
    for step in (1, 2, 3, 4):
        save(tmp_path, step, marked(step), keep=None)
    (tmp_path / "step-00000004" / "MANIFEST.json").unlink()
    load_newest(tmp_path)  # sets step 4 aside
    tensors = tmp_path / "step-00000002" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")  # its size is right
    (tmp_path / ".tmp-00000005-0a1b2c3d").mkdir()
    quick = survey(tmp_path, quick=True)
    assert [entry.step for entry in quick] == [3, 2, 1, 4, 5]
    assert [entry.state for entry in quick] == ["complete", "complete", "complete", "damaged", "tmp"]
    full = survey(tmp_path)
    assert [entry.state for entry in full] == ["good", "damaged", "good", "damaged", "tmp"]
    assert "tensors.safetensors does not have the sha256" in full[1].reason
    assert full[3].reason == "found damaged before and set aside"
    for entry in full:
        assert (entry.manifest is not None) == (entry.size_bytes is not None) == (entry.state == "good")
        assert entry.written is not None
    assert full[0].size_bytes == (tmp_path / "step-00000003" / "tensors.safetensors").stat().st_size


def test_a_checkpoint_that_cannot_be_checked_has_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="finds no directory"):
        inspect(tmp_path, "step-00000001")


def test_tensors_are_listed_once_in_the_order_of_the_state(tmp_path: Path) -> None:
    tied = torch.ones(2, 3, dtype=torch.bfloat16)
    state = {"b": tied, "a": [torch.tensor(1), {"tied": tied}], 7: torch.empty(0)}
    rows = tensors_of(verify(save(tmp_path, 1, state)))
    assert [row[:3] for row in rows] == [("b", "bfloat16", [2, 3]), ("a.0", "int64", []), ("7", "float32", [0])]
    assert {row.where for row in rows} == {""}  # there is one file


def test_tensors_in_several_files_are_listed_with_their_numbers(tmp_path: Path) -> None:
    rows = tensors_of(verify(victim_in_two(tmp_path / "two")))
    files = {row.name: row.where for row in rows}
    assert files.pop("count") == "2"
    assert [files[f"model.{i}.weight"] for i in range(3)] == ["1-2 along 0", "1", "1-2 along 0"]
    assert {row.where for row in tensors_of(verify(victim(tmp_path / "one")))} == {""}


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        ({"step": 3, "monitor": "loss", "value": 0.5}, BestStep(3, "loss", 0.5)),
        ({"step": 3, "monitor": "hits", "value": 2, "more": None}, BestStep(3, "hits", 2.0)),
        ({"step": 3, "monitor": "loss", "value": math.nan}, None),
        ({"step": 3, "monitor": "loss", "value": "0.5"}, None),
        ({"step": 3, "value": 0.5}, None),
        (None, None),
        ([3], None),
    ],
)
def test_the_best_step_is_read_only_from_a_whole_entry(best: Any, expected: BestStep | None) -> None:
    assert best_in({"best": best}) == expected
    assert best_in({}) is None


def entry(step: int, state: Any, best: int | None = None) -> ListedCheckpoint:
    position = {} if best is None else {"best": {"step": best, "monitor": "loss", "value": 0.5}}
    manifest = Manifest(**dict(CheckpointInfo(position=position)), step=step, files={"tensors.safetensors": RECORD})
    is_read = state in ("good", "complete")
    return ListedCheckpoint(checkpoint_name(step), step, state, "", manifest if is_read else None, None, None)


STATES = st.lists(st.sampled_from(["good", "good", "damaged", "tmp"]), max_size=7)


@given(states=STATES, keep=st.integers(-1, 8), damaged=st.booleans(), best=st.none() | st.integers(0, 7))
def test_the_newest_good_ones_and_the_best_stay(states: list[Any], keep: int, damaged: bool, best: int | None) -> None:
    steps = range(len(states), 0, -1)  # newest first
    entries = [entry(step, state, best) for step, state in zip(steps, states, strict=True)]
    good = [each for each in entries if each.state == "good"]
    if not good:
        with pytest.raises(CheckpointError, match="none of the checkpoints is good, so none is removed"):
            plan_prune(entries, keep, damaged=damaged)
        return
    assert best_of(entries) == (None if best is None else BestStep(best, "loss", 0.5))
    plan = plan_prune(entries, keep, damaged=damaged)
    newest, older = good[: max(1, keep)], good[max(1, keep) :]
    assert plan.keep == newest + [each for each in older if each.step == best]
    bad = [each for each in entries if damaged and each.state == "damaged"]
    assert plan.remove == [each for each in older if each.step != best] + bad


def test_anchors_stay_unless_they_are_to_go() -> None:
    entries = [entry(step, "good") for step in (5, 4, 3, 2, 1)]
    for place in (0, 2, 4):
        manifest = entries[place].manifest
        assert manifest is not None
        anchored = manifest.model_copy(update={"position": {"anchor": True}})
        entries[place] = entries[place]._replace(manifest=anchored)
    assert [each.step for each in entries if is_anchor(each)] == [5, 3, 1]
    assert [each.step for each in plan_prune(entries, 1).remove] == [4, 2]
    assert [each.step for each in plan_prune(entries, 1, anchors=True).remove] == [4, 3, 2, 1]
