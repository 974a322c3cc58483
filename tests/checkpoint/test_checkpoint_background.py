"""Saving while the training continues: the same bytes, one save at a time, and a failure that reaches every rank."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import DTYPES, files, mark_of, marked, tensor_of, training_state
from ranks import Ranks

from disttrain.backend import Backend
from disttrain.checkpoint import AsynchronousSaver, DirectorySaver, committed, load, load_newest, staging
from disttrain.errors import CheckpointError


class Gate:
    """Makes fsync wait until the gate is opened, so a test decides how long a save is under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self._open = threading.Event(), threading.Event()
        fsync = os.fsync

        def waiting(descriptor: int) -> None:
            self.entered.set()
            assert self._open.wait(30)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", waiting)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def name(step: int) -> str:
    return f"step-{step:08d}"


@pytest.mark.parametrize(
    "state",
    [
        training_state(),
        {str(dtype): tensor_of(dtype, [3, 2]) for dtype in DTYPES},
        {"t": torch.arange(6.0).reshape(2, 3).T, "e": torch.ones(1).expand(4), "c": torch.ones(2) * 1j, "n": []},
    ],
    ids=["training", "dtypes", "views"],
)
def test_the_bytes_are_those_of_a_synchronous_save(tmp_path: Path, state: Any) -> None:
    with AsynchronousSaver(tmp_path / "a") as saver:
        for step in (1, 2):  # the second save copies into the memory of the first
            saver(state, name(step), {})
        saver.settle()
    DirectorySaver(tmp_path / "s")(state, name(2), {})
    assert files(tmp_path / "a" / name(2)) == files(tmp_path / "s" / name(2))


def test_the_state_at_the_call_is_saved(tmp_path: Path, gate: Gate) -> None:
    state = marked(3)
    with AsynchronousSaver(tmp_path) as saver:
        saver(state, name(3), {})
        for tensor in (*state["model"].values(), state["count"]):
            tensor.fill_(7)
        state["history"].append(7)
        assert gate.entered.wait(10)
        assert committed(tmp_path) == []
        saver.poll()
        gate.open()
        saver.settle()
        assert mark_of(load(tmp_path / name(3)).state) == 3


def test_the_next_save_waits_for_the_one_under_way(tmp_path: Path, gate: Gate) -> None:
    with AsynchronousSaver(tmp_path) as saver:
        saver(marked(1), name(1), {})
        assert gate.entered.wait(10)
        threading.Timer(0.2, gate.open).start()
        saver(marked(2), name(2), {})
        assert name(1) in committed(tmp_path)
        saver.settle()
        assert committed(tmp_path) == [name(2), name(1)]


def test_an_old_checkpoint_goes_only_after_the_new_one_is_committed(tmp_path: Path, gate: Gate) -> None:
    with AsynchronousSaver(tmp_path) as saver:
        gate.open()
        saver(marked(1), name(1), {})
        saver.settle()
    slow = Gate(pytest.MonkeyPatch())
    try:
        with AsynchronousSaver(tmp_path) as saver:
            saver(marked(2), name(2), {})
            saver.remove(name(1))
            assert slow.entered.wait(10)
            assert committed(tmp_path) == [name(1)]
            slow.open()
            saver.settle()
        assert committed(tmp_path) == [name(2)]
    finally:
        slow.open()


def fails(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("wait", [AsynchronousSaver.settle, AsynchronousSaver.poll])
def test_a_failed_save_is_raised_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: Callable[[AsynchronousSaver], None]
) -> None:
    with AsynchronousSaver(tmp_path) as saver:
        saver(marked(1), name(1), {})
        saver.settle()
        monkeypatch.setattr(os, "fsync", fails)
        saver(marked(2), name(2), {})
        saver.remove(name(1))
        assert saver._job is not None
        assert saver._job.ended(10)
        with pytest.raises(CheckpointError, match=r"step-00000002: No space left on device; it needs \d+ bytes"):
            wait(saver)
        monkeypatch.undo()
        assert os.listdir(tmp_path) == [name(1)]
        saver.settle()
        saver(marked(3), name(3), {})
        saver.settle()
    assert committed(tmp_path) == [name(3), name(1)]


def test_a_state_that_cannot_be_held_is_refused_at_once(tmp_path: Path) -> None:
    with AsynchronousSaver(tmp_path) as saver, pytest.raises(CheckpointError, match=r"state\['a'\] is a set"):
        saver({"a": {1}}, name(1), {})
    assert not any(tmp_path.iterdir())


def test_leaving_the_context_waits_and_logs_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="mine"), AsynchronousSaver(tmp_path) as saver:
        saver(marked(1), name(1), {})
        raise ValueError("mine")
    assert committed(tmp_path) == [name(1)]
    monkeypatch.setattr(os, "fsync", fails)
    with AsynchronousSaver(tmp_path) as saver:
        saver(marked(2), name(2), {})
    assert "the last checkpoint was not saved: cannot write the checkpoint" in caplog.text


def test_stopping_at_once_does_not_wait(tmp_path: Path, gate: Gate) -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), AsynchronousSaver(tmp_path) as saver:
        saver(marked(1), name(1), {})
        assert gate.entered.wait(10)
        raise KeyboardInterrupt
    assert committed(tmp_path) == []
    assert time.monotonic() - began < 10
    gate.open()
    assert saver._job is not None
    saver._job.ended(None)


def test_the_expected_time_includes_the_rest_of_the_save_under_way(tmp_path: Path, gate: Gate) -> None:
    saver = AsynchronousSaver(tmp_path)
    saver({"n": 1}, name(1), {})
    assert gate.entered.wait(30)
    assert saver.under_way
    first = saver.expected_s()
    assert first is not None  # it takes at least as long as it has taken so far
    assert 0 < first < 60
    gate.open()
    saver.settle()
    once = saver.expected_s()
    assert once is not None
    assert once >= first
    assert not saver.under_way
    again = Gate(pytest.MonkeyPatch())
    saver({"n": 2}, name(2), {})
    assert again.entered.wait(30)
    twice = saver.expected_s()
    assert twice is not None
    assert twice >= once
    again.open()
    saver.settle()


def test_a_save_may_use_the_time_that_it_is_given(tmp_path: Path, gate: Gate) -> None:
    with AsynchronousSaver(tmp_path) as saver:
        saver({"n": 1}, name(1), {})
        assert gate.entered.wait(30)
        threading.Timer(0.1, gate.open).start()
        saver.abandon(60)
        assert committed(tmp_path) == [name(1)]


def test_nobody_waits_for_an_abandoned_save(tmp_path: Path, gate: Gate) -> None:
    with AsynchronousSaver(tmp_path) as saver:
        saver({"n": 1}, name(1), {})
        assert gate.entered.wait(30)
        saver.poll()
        saver.abandon()
        saver.poll()
        saver.settle()  # at once: the gate is closed
        assert not saver.under_way
    assert committed(tmp_path) == []
    gate.open()


class Slow:
    """Makes the copy of the rest wait until a test lets it go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        copy_all = staging._copy_all

        def waiting(pairs: Any) -> None:
            if threading.current_thread().name == "disttrain-checkpoint":
                self.begun.set()
                assert self.go_on.wait(30)
            copy_all(pairs)

        monkeypatch.setattr(staging, "_copy_all", waiting)


WIDTH = 600  # a state that is large enough for two files


def adam() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(WIDTH, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step_once(model, optimizer)
    return model, optimizer


def step_once(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, WIDTH)).sum().backward()
    optimizer.step()


def of_optimizer(name: str) -> bool:
    return name.startswith("optimizer.")


def test_an_optimizer_step_waits_for_the_copy_of_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    model, optimizer = adam()
    DirectorySaver(tmp_path / "s")({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, name(1), {})
    with AsynchronousSaver(tmp_path / "a", later=of_optimizer) as saver:
        optimizer.register_step_pre_hook(lambda *_: saver.copied())
        saver({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, name(1), {})
        assert slow.begun.wait(30)
        with torch.no_grad():
            model.weight.zero_()  # it is not selected to be copied later
        stepped = threading.Thread(target=step_once, args=(model, optimizer))
        stepped.start()
        stepped.join(0.3)
        assert stepped.is_alive()
        slow.go_on.set()
        stepped.join(30)
        assert not stepped.is_alive()
        saver.settle()
    assert files(tmp_path / "a" / name(1)) == files(tmp_path / "s" / name(1))


def test_a_change_during_the_copy_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    model, optimizer = adam()
    with AsynchronousSaver(tmp_path, later=of_optimizer) as saver:
        saver({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, name(1), {})
        assert slow.begun.wait(30)
        optimizer.state[model.weight]["exp_avg"].zero_()
        slow.go_on.set()
        with pytest.raises(CheckpointError, match=r"^optimizer.state.0.exp_avg was changed while it was copied"):
            saver.settle()
        saver.copied()  # it does not wait for a copy that has failed
    assert committed(tmp_path) == []


def step_while_saving(backend: Backend, root: Path) -> None:
    model, optimizer = adam()
    with (
        pytest.MonkeyPatch.context() as patch,
        AsynchronousSaver(root, backend=backend, later=of_optimizer) as saver,
    ):
        slow = Slow(patch)
        optimizer.register_step_pre_hook(lambda *_: saver.copied())
        for step in (1, 2, 3):
            slow.go_on.clear()
            slow.begun.clear()
            saver({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, name(step), {})
            assert slow.begun.wait(30)
            threading.Timer(0.1, slow.go_on.set).start()  # while the step waits
            step_once(model, optimizer)
            saver.poll()
        saver.settle()


def test_ranks_that_continue_at_once_have_saved_the_state_at_the_call(ranks: Ranks, tmp_path: Path) -> None:
    model, optimizer = adam()
    expected = DirectorySaver(tmp_path / "s")
    for step in (1, 2, 3):
        expected({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, name(step), {})
        step_once(model, optimizer)
    ranks(2, step_while_saving, tmp_path / "a")
    for step in (1, 2, 3):
        one, two = load(tmp_path / "a" / name(step)), load(tmp_path / "s" / name(step))
        assert one.manifest.step == two.manifest.step == step
        assert len(one.manifest.files) == 2
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(one.state["optimizer"]["state"][0][key], two.state["optimizer"]["state"][0][key])
        assert torch.equal(one.state["model"]["weight"], two.state["model"]["weight"])


def save_on_ranks(backend: Backend, root: Path) -> list[int]:
    """Save at every second of nine steps; return the steps at which this rank polled the others."""
    polled = []
    with AsynchronousSaver(root, backend=backend) as saver:
        for step in range(1, 10):
            if step % 2 == 0:
                saver(marked(step) if backend.rank == 0 else {"a": {1}}, name(step), {})
                saver.remove(name(step - 4))
            saver.poll()
            if saver._pending_poll is not None:
                polled.append(step)
        saver.settle()
    loaded = load_newest(root, backend)
    assert loaded is not None
    assert mark_of(loaded.state) == 8
    return polled


def test_ranks_poll_each_other_only_while_a_save_is_under_way(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(2, save_on_ranks, tmp_path)
    assert first == second
    assert set(first) <= {2, 3, 4, 5, 6, 7, 8, 9}
    assert committed(tmp_path) == [name(8), name(6)]


def fail_on_ranks(backend: Backend, root: Path) -> tuple[int, str]:
    """Return the step at whose end this rank raised the failure of rank 0, and the message."""
    with AsynchronousSaver(root, backend=backend) as saver:
        if backend.rank == 0:
            os.fsync = fails  # type: ignore[assignment]
        saver(marked(1), name(1), {})
        if saver._job is not None:
            assert saver._job.ended(10)
        for step in range(1, 10):
            try:
                saver.poll()
            except CheckpointError as error:
                return step, str(error)
    return 0, ""


def test_every_rank_raises_the_failure_of_a_save_at_the_same_step(ranks: Ranks, tmp_path: Path) -> None:
    raised = ranks(2, fail_on_ranks, tmp_path, fresh=True)
    assert raised[0] == raised[1]
    assert raised[0][0] > 0
    assert "No space left on device" in raised[0][1]
    assert committed(tmp_path) == []
