"""A rank that stands still is named by what it was doing and where, once, and all ranks end."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks

from disttrain.backend import Backend, connect
from disttrain.engine import Engine
from disttrain.observe.watchdog import Silence, Watchdog, report


def stand_still(seconds: float) -> None:
    time.sleep(seconds)


class Code:
    """In the place of the process's end, which a test outlives: keeps the exit code."""

    code: int | None = None

    def __call__(self, code: int) -> None:
        self.code = code


def test_a_loader_that_hangs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def batches() -> Any:
        yield 1
        yield 2
        stand_still(3)
        yield 3

    end = Code()
    engine = Engine(lambda engine, batch: batch)
    with connect("single") as backend, Watchdog(backend, 0.5, tmp_path, end=end) as watchdog:
        watchdog.attach(engine)
        engine.run(batches(), max_epochs=1, epoch_length=3)
        failure = backend.first_failure(0)
    assert end.code == 1
    said = capsys.readouterr().err
    assert said.startswith("HangError: no progress for ")
    assert said.count("HangError") == 1
    assert "is loading the batch of step 3, at " in said
    assert f"{Path(__file__).name}:" in said
    assert "in stand_still" in said
    assert "raise timeout_s" in said
    assert failure is not None
    assert "loading the batch of step 3" in failure.message
    stacks = (tmp_path / "rank-0.stacks.txt").read_text()
    assert "in stand_still" in stacks
    assert "disttrain-watchdog" in stacks or "_watch" in stacks


def test_one_that_makes_progress_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end = Code()
    engine = Engine(lambda engine, batch: stand_still(0.2))
    with connect("single") as backend, Watchdog(backend, 1.0, tmp_path, end=end) as watchdog:
        watchdog.attach(engine)
        engine.run(range(8), max_epochs=1)  # longer in all than the timeout
        for _ in watchdog.watched(range(8), "evaluating"):
            stand_still(0.2)
        assert watchdog._doing == "evaluating, batch 8"
    assert end.code is None
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def hang_on(backend: Backend, logs: Path, hanging: int) -> tuple[int | None, str]:
    """One rank stands still, the others wait for it in a collective; return the exit code and what broke that."""
    end = Code()
    broken = ""
    with Watchdog(backend, 1.0, logs, meeting=lambda: "bucket 3 is on its way", end=end) as watchdog:
        for step in range(1, 4):
            watchdog.progress(f"computing step {step}")
            if step == 2 and backend.rank == hanging:
                stand_still(6)
            try:
                backend.all_reduce(step)
            except Exception as error:
                broken = type(error).__name__
                break
        watchdog._thread.join(20)
    return end.code, broken


@pytest.mark.parametrize("hanging", [0, 1])
def test_who_hangs_and_who_waits_is_told_once(ranks: Ranks, tmp_path: Path, hanging: int) -> None:
    found = ranks(2, hang_on, tmp_path, hanging, fresh=True)
    assert found[1 - hanging][1] != ""  # the collective that it waited in was broken for it
    assert found[hanging][0] == 1
    told = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.hang.json"))]
    assert [(t["rank"], t["waits"]) for t in told] == [(0, hanging != 0), (1, hanging != 1)]
    assert all(t["doing"] == "computing step 2" for t in told)
    assert "in stand_still" in told[hanging]["where"]
    call = r"all_reduce\(int, op='sum'\) \(call \d+\), "
    assert re.fullmatch(call + r"under way for \d s; bucket 3 is on its way", told[1 - hanging]["collective"])
    assert re.fullmatch(call + r"ended \d s ago; bucket 3 is on its way", told[hanging]["collective"])
    for rank in (0, 1):
        remembered = json.loads((tmp_path / f"rank-{rank}.collectives.json").read_text())
        assert {entry["profiling_name"] for entry in remembered["entries"]} >= {"gloo:all_gather"}


def silence(rank: int, waits: bool, collective: str = "") -> Silence:
    doing, where = f"computing step {rank + 5}", f"cfg.py:{rank} in f"
    return Silence(rank, f"host-{rank}", 100 + rank, doing, 31.0, where, waits, collective)


@pytest.mark.parametrize(
    ("told", "world_size", "expected"),
    [
        (
            [silence(0, True), silence(1, False), silence(2, True)],
            3,
            "rank 1 (process 101 on host-1) is computing step 6, at cfg.py:1 in f; ranks 0, 2 wait for it.",
        ),
        ([silence(0, True)], 2, "rank 1 did not answer: stopped, cut off, or busy in a library; rank 0 waits for it."),
        (
            [silence(0, True), silence(1, True)],
            2,
            "all ranks wait for each other (computing step 5, at cfg.py:0 in f; ",
        ),
        (
            [silence(0, True, "barrier() (call 8), ended 31 s ago"), silence(1, False, "agree('x')")],
            2,
            "rank 0 waits for it. Last collectives: rank 0: barrier() (call 8), ended 31 s ago. rank 1: agree('x'). ",
        ),
        (
            [silence(rank, True, "x") for rank in range(99)],
            99,
            "rank 7: x. and 91 more in runs/x/logs/rank-*.hang.json.",
        ),
        ([silence(0, False)], 1, "rank 0 (process 100 on host-0) is computing step 5, at cfg.py:0 in f."),
    ],
)
def test_the_report_says_who_waits_for_whom(told: list[Silence], world_size: int, expected: str) -> None:
    said = report(told, world_size, 31.4, Path("runs/x/logs"))
    assert said.startswith("no progress for 31 s: ")
    assert expected in said
    assert "runs/x/logs/rank-*.stacks.txt" in said
