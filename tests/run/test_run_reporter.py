"""Ledger, curves, display and posts get the same lines; a rank without curves and display writes only its ledger."""

from typing import Any

import pytest

from disttrain.handlers.losses import Pace
from disttrain.run.reporter import Reporter

PACE = Pace(2, 1, 0.5, 0.1, 100.0)
LINES = [{"step": 1, "loss": 0.75}, {"step": 2, "loss": 0.5}]


class Recorder:
    """Records every call as (name, *arguments)."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))


def test_every_call_is_passed_on() -> None:
    ledger, curves, display, posts = Recorder(), Recorder(), Recorder(), Recorder()
    reporter = Reporter(ledger, curves, display, posts)  # type: ignore[arg-type]
    reporter.fetched(LINES, PACE)
    reporter.validated(2, 1, {"loss": 0.25})
    reporter.warn("rank 1 is slow")
    reporter.sync()
    reporter.close()
    assert ledger.calls == [("fetched", LINES), ("sync",), ("close",)]
    assert curves.calls == [("trained", LINES, PACE), ("validated", 2, 1, {"loss": 0.25}), ("sync",), ("close",)]
    validated = ("validated", 2, 1, {"loss": 0.25})
    assert display.calls == [("pace", PACE), validated, ("line", "WARNING: rank 1 is slow"), ("close",)]
    assert posts.calls == [("pace", PACE), ("validated", {"loss": 0.25}), ("close",)]


def test_a_full_disk_does_not_leave_the_display_on_the_screen() -> None:
    class Full(Recorder):
        def close(self) -> None:
            raise OSError(28, "No space left on device")

    curves, display = Recorder(), Recorder()
    with pytest.raises(OSError, match="No space left"):
        Reporter(Full(), curves, display).close()  # type: ignore[arg-type]
    assert curves.calls == display.calls == [("close",)]


def test_the_other_ranks_write_only_a_ledger() -> None:
    ledger = Recorder()
    reporter = Reporter(ledger, None, None)  # type: ignore[arg-type]
    reporter.fetched(LINES, PACE)
    reporter.validated(2, 1, {})
    reporter.warn("not shown here")
    assert reporter.newest() == {}
    reporter.sync()
    reporter.close()
    assert [name for name, *_ in ledger.calls] == ["fetched", "sync", "close"]
