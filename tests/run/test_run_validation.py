"""An evaluation after a step: its results are reported; if a signal interrupts it, it is still due."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from small_run import small_run

from disttrain.handlers.compilations import Compilations
from disttrain.run.validation import Validation


class Preemption:
    """A double that has a stop request or not."""

    def __init__(self, stop: bool) -> None:
        self.stop = stop

    def asked(self) -> bool:
        return self.stop


class Watchdog:
    """A double that counts the batches that it watches."""

    num_batches = 0

    def watched(self, batches: Iterable[Any], doing: str) -> Iterator[Any]:
        for batch in batches:
            self.num_batches += 1
            yield batch


class Reporter:
    def __init__(self) -> None:
        self.reported: list[tuple[Any, ...]] = []

    def validated(self, *values: Any) -> None:
        self.reported.append(values)


def validation(folder: Path, stop: bool) -> tuple[Any, Validation, Watchdog, Reporter]:
    run, watchdog, reporter = small_run(folder), Watchdog(), Reporter()
    assert run.evaluation is not None
    validate = Validation(
        run,
        run.evaluation,
        Preemption(stop),  # type: ignore[arg-type]
        watchdog,  # type: ignore[arg-type]
        Compilations(run.backend),
        reporter,  # type: ignore[arg-type]
    )
    return run, validate, watchdog, reporter


def test_results_are_reported_at_the_step(tmp_path: Path) -> None:
    run, validate, watchdog, reporter = validation(tmp_path, stop=False)
    values = validate(run.trainer)
    assert reporter.reported == [(0, 0, values)]
    assert watchdog.num_batches == 3  # 12 samples, 4 per slot
    assert not run.evaluation_due


def test_an_evaluation_that_a_signal_interrupts_is_still_due(tmp_path: Path) -> None:
    run, validate, _, reporter = validation(tmp_path, stop=True)
    assert validate(run.trainer) is None
    assert run.evaluation_due
    assert reporter.reported == []
