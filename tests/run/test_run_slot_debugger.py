"""The debugger opens before the model is called on a slot, with the variables of the step; going on changes no bit."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from small_run import console, single, small_config, trained
from torch import Tensor, nn

from disttrain.evidence import read_ledger
from disttrain.run.directory import RunDirectory
from disttrain.run.replay import Replay, Replayed, replay_config
from disttrain.run.replay_start import starts_before
from disttrain.run.replayed_slots import SlotWatcher
from disttrain.run.slot_debugger import open_debugger

pytestmark = pytest.mark.usefixtures("torch_settings")


def debugged(folder: Path, slot: int, **changes: Any) -> Replayed:
    directory, shadow = RunDirectory(folder / "small"), RunDirectory(folder / "shadow" / "small")
    with single() as backend:
        config = replay_config(small_config(**changes))
        lines = read_ledger(directory.ledger_jsonl)
        watcher = SlotWatcher(5, before=open_debugger(slot))
        starts = starts_before(directory, [], 5, console())
        return Replay(config, backend, directory, shadow, lines, console()).run(starts, watcher)


def test_it_opens_once_in_the_slot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in the first step of a process, whose first slot is rehearsed."""
    trained(tmp_path)
    for slot in (0, 1):
        monkeypatch.setattr(
            sys, "stdin", io.StringIO("p ('seen', step, slot, len(x), len(batch), run.config.seed)\nc\n")
        )
        found = debugged(tmp_path, slot)
        assert found.num_proven == 1
        out = capsys.readouterr().out
        assert out.count(f"('seen', 5, {slot}, 4, 2, 5)") == 1
        assert f"step 5, slot {slot}, before model(x)" in out


def test_a_step_into_the_model_and_the_frame_that_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path)
    typed = "tbreak model.forward\nc\np 'inside', tuple(input.shape)\nc\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert debugged(tmp_path, 0).num_proven == 1
    assert "('inside', (4, 3))" in capsys.readouterr().out


def without_call(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    output = model[2](model[1](model[0](batch[0])))  # type: ignore[index]
    return (output - batch[1]).square().mean(), output


def test_a_forward_that_never_calls_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, loss=None, forward=without_call)
    assert debugged(tmp_path, 0, loss=None, forward=without_call).num_proven == 1
    assert capsys.readouterr().out == ""
