"""An evaluation after a step: its results are reported; if a signal interrupts it, it is still due."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import console, printed, small_run
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from disttrain.engine import RunEvents
from disttrain.handlers.compilations import Compilations
from disttrain.run.validation import Validation, warn_of_mode


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


def validation(folder: Path, stop: bool, **changes: Any) -> tuple[Any, Validation, Watchdog, Reporter]:
    run, watchdog, reporter = small_run(folder, **changes), Watchdog(), Reporter()
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


def test_handlers_of_the_event_find_the_results_that_were_reported(tmp_path: Path) -> None:
    run, validate, _, reporter = validation(tmp_path, stop=False)
    found: list[Any] = []
    run.trainer.add_event_handler(
        RunEvents.EVALUATED, lambda: found.append((dict(run.trainer.state.metrics), len(reporter.reported)))
    )
    values = validate(run.trainer)
    assert found == [({"valid/loss": values["loss"]}, 1)]
    assert run.trainer.state.evaluations == 1


def test_draws_of_these_handlers_follow_from_the_step_and_change_no_other(tmp_path: Path) -> None:
    drawn: list[float] = []
    for number in range(2):
        run, validate, _, _ = validation(tmp_path, stop=False)
        run.trainer.add_event_handler(RunEvents.EVALUATED, lambda: drawn.append(float(torch.rand(1))))
        torch.manual_seed(number)
        before = torch.get_rng_state()
        validate(run.trainer)
        assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[1]


def test_no_event_without_a_whole_evaluation(tmp_path: Path) -> None:
    run, validate, _, _ = validation(tmp_path, stop=True)
    run.trainer.add_event_handler(RunEvents.EVALUATED, lambda: pytest.fail("the evaluation was interrupted"))
    assert validate(run.trainer) is None
    assert run.trainer.state.metrics == {}


class OtherRank:
    """A backend of rank 0, whose result differs from this rank's in its last bit."""

    def broadcast(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value + 2.0**-40 for name, value in values.items()}


def test_every_rank_takes_the_results_of_rank_0(tmp_path: Path) -> None:
    run, validate, _, reporter = validation(tmp_path, stop=False)
    own = run.evaluation.run()
    run.backend = OtherRank()
    values = validate(run.trainer)
    assert values == {"loss": own["loss"] + 2.0**-40} == run.evaluated.results
    assert reporter.reported[0][2] == values


@pytest.mark.parametrize(
    ("mode", "monitor", "warning"),
    [
        ("min", "loss", ""),
        ("max", "accuracy", ""),
        ("min", "accuracy", "follows 'accuracy', of which large values are good; expected mode='max'"),
        ("max", "error", "follows 'error', of which small values are good; expected mode='min'"),
    ],
)
def test_a_plateau_of_the_wrong_direction_gives_a_warning(
    tmp_path: Path, mode: Any, monitor: str, warning: str
) -> None:
    run = small_run(
        tmp_path,
        metrics={"accuracy": lambda: MulticlassAccuracy(2), "error": MeanSquaredError},
        schedule=lambda optimizer, _: ReduceLROnPlateau(optimizer, mode=mode),
        schedule_monitor=monitor,
    )
    to = console()
    warn_of_mode(run, to)
    assert (warning in printed(to)) if warning else printed(to) == ""


def test_nobody_knows_which_values_of_a_forward_are_good(tmp_path: Path) -> None:
    def forward(model: Any, batch: Any) -> Any:
        x, y = batch
        return (model(x) - y).square().mean(), None, {"hits": 1.0}

    run = small_run(
        tmp_path,
        loss=None,
        forward=forward,
        schedule=lambda optimizer, _: ReduceLROnPlateau(optimizer, mode="max"),
        schedule_monitor="hits",
    )
    to = console()
    warn_of_mode(run, to)
    assert printed(to) == ""
