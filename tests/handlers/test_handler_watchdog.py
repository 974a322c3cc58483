"""A rank that makes no progress is reported once, with its activity and place in the code, and all ranks end."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks

from disttrain.backend import Backend, connect
from disttrain.engine import Engine
from disttrain.handlers.watchdog import HangReport, Watchdog, hang_message


def hang_in_user_code(seconds: float) -> None:
    time.sleep(seconds)


class Code:
    """Keeps the exit code instead of ending the process, which is the test's own."""

    code: int | None = None

    def __call__(self, code: int) -> None:
        self.code = code


def test_a_loader_that_hangs_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def batches() -> Any:
        yield 1
        yield 2
        hang_in_user_code(3)
        yield 3

    end = Code()
    engine = Engine(lambda engine, batch: batch)
    with connect("single") as backend, Watchdog(backend, 0.5, tmp_path, end=end) as watchdog:
        watchdog.attach(engine)
        engine.run(batches(), max_epochs=1, epoch_length=3)
        failure = backend.first_failure(0)
    assert end.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("HangError: no progress for ")
    assert printed.count("HangError") == 1
    assert "is loading the batch of step 3, at " in printed
    assert f"{Path(__file__).name}:" in printed
    assert "in hang_in_user_code" in printed
    assert "raise timeout_s" in printed
    assert failure is not None
    assert "loading the batch of step 3" in failure.message
    stacks = (tmp_path / "rank-0.stacks.txt").read_text()
    assert "in hang_in_user_code" in stacks
    assert "disttrain-watchdog" in stacks or "_watch" in stacks


def test_a_rank_that_makes_progress_is_not_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end = Code()
    engine = Engine(lambda engine, batch: hang_in_user_code(0.2))
    with connect("single") as backend, Watchdog(backend, 1.0, tmp_path, end=end) as watchdog:
        watchdog.attach(engine)
        engine.run(range(8), max_epochs=1)  # longer in all than the timeout
        for _ in watchdog.watched(range(8), "evaluating"):
            hang_in_user_code(0.2)
        assert watchdog._doing == "evaluating, batch 8"
    assert end.code is None
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def hang_on(backend: Backend, logs: Path, hanging: int) -> tuple[int | None, str]:
    """One rank hangs, the others wait for it in a collective; return the exit code and the collective's error."""
    end = Code()
    broken = ""
    with Watchdog(backend, 1.0, logs, meeting=lambda: "bucket 3 is on its way", end=end) as watchdog:
        for step in range(1, 4):
            watchdog.progress(f"computing step {step}")
            if step == 2 and backend.rank == hanging:
                hang_in_user_code(6)
            try:
                backend.all_reduce(step)
            except Exception as error:
                broken = type(error).__name__
                break
        watchdog._thread.join(20)
    return end.code, broken


@pytest.mark.parametrize("hanging", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_rank_that_hangs_and_the_rank_that_waits_are_reported(ranks: Ranks, tmp_path: Path, hanging: int) -> None:
    ended = ranks(2, hang_on, tmp_path, hanging, fresh=True)
    assert ended[1 - hanging][1] != ""  # the collective in which it waited has failed
    assert ended[hanging][0] == 1
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.hang.json"))]
    assert [(r["rank"], r["waits"]) for r in reports] == [(0, hanging != 0), (1, hanging != 1)]
    assert all(r["doing"] == "computing step 2" for r in reports)
    assert "in hang_in_user_code" in reports[hanging]["where"]
    call = r"all_reduce\(int, op='sum'\) \(call \d+\), "
    assert re.fullmatch(call + r"under way for \d s; bucket 3 is on its way", reports[1 - hanging]["collective"])
    assert re.fullmatch(call + r"ended \d s ago; bucket 3 is on its way", reports[hanging]["collective"])
    for rank in (0, 1):
        recorded = json.loads((tmp_path / f"rank-{rank}.collectives.json").read_text())
        assert {entry["profiling_name"] for entry in recorded["entries"]} >= {"gloo:all_gather"}


def report(rank: int, waits: bool, collective: str = "") -> HangReport:
    doing, where = f"computing step {rank + 5}", f"cfg.py:{rank} in f"
    return HangReport(rank, f"host-{rank}", 100 + rank, doing, 31.0, where, waits, collective)


@pytest.mark.parametrize(
    ("reports", "world_size", "expected"),
    [
        (
            [report(0, True), report(1, False), report(2, True)],
            3,
            "rank 1 (process 101 on host-1) is computing step 6, at cfg.py:1 in f; ranks 0, 2 wait for it.",
        ),
        ([report(0, True)], 2, "rank 1 did not answer: stopped, cut off, or busy in a library; rank 0 waits for it."),
        (
            [report(0, True), report(1, True)],
            2,
            "all ranks wait for each other (computing step 5, at cfg.py:0 in f; ",
        ),
        (
            [report(0, True, "barrier() (call 8), ended 31 s ago"), report(1, False, "agree('x')")],
            2,
            "rank 0 waits for it. Last collectives: rank 0: barrier() (call 8), ended 31 s ago. rank 1: agree('x'). ",
        ),
        (
            [report(rank, True, "x") for rank in range(99)],
            99,
            "rank 7: x. and 91 more in runs/x/logs/rank-*.hang.json.",
        ),
        ([report(0, False)], 1, "rank 0 (process 100 on host-0) is computing step 5, at cfg.py:0 in f."),
    ],
)
def test_the_message_names_the_ranks_that_hang_and_those_that_wait(
    reports: list[HangReport], world_size: int, expected: str
) -> None:
    message = hang_message(reports, world_size, 31.4, Path("runs/x/logs"))
    assert message.startswith("no progress for 31 s: ")
    assert expected in message
    assert "runs/x/logs/rank-*.stacks.txt" in message
