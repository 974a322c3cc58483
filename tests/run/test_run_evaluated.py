"""Followers of evaluations find the same before and after a kill: results, their number, the rates of a plateau."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import dies_after, points, small_run, trained
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Dataset
from torchmetrics import MeanAbsoluteError

from disttrain.engine import Engine, Events, RunEvents, State
from disttrain.errors import ConfigError
from disttrain.handlers.step_end import StepEnd
from disttrain.run.evaluated import Evaluated
from disttrain.run.state import Run

OFTEN = {"validate": {"every_steps": 3}, "checkpoint": {"every_steps": 2}, "log": {"every_steps": 1}, "max_epochs": 5}
"""20 steps, evaluated after 3, 6, ..., 18 and 20."""


def test_results_and_their_number_are_shown_and_saved() -> None:
    evaluated, state = Evaluated(), State()
    evaluated.show(state)
    assert (state.metrics, state.evaluations) == ({}, 0)
    evaluated.record(3, {"loss": 0.5, "by_class": [0.1, float("nan")]})
    again = Evaluated()
    again.load_state_dict(evaluated.state_dict())
    again.record(6, {"loss": 0.25, "by_class": [0.1, 0.2]})
    again.show(state)
    assert (again.step, again.number) == (6, 2)
    assert (state.metrics, state.evaluations) == ({"valid/loss": 0.25, "valid/by_class": [0.1, 0.2]}, 2)


class Halving:
    """A handler that follows the evaluations in several ways, and dies after some step of its first life."""

    __name__ = "halving"

    def __init__(self, dies_after: int | None = None) -> None:
        self.seen: list[Any] = []
        self.dies_after = dies_after

    def __call__(self, trainer: Engine, run: Run) -> None:
        @trainer.on(RunEvents.EVALUATED)
        def see(engine: Engine) -> None:
            state = engine.state
            self.seen.append((state.iteration, state.epoch, state.evaluations, state.metrics["valid/loss"]))

        @trainer.on(RunEvents.EVALUATED(every=2))
        def halve() -> None:
            for group in run.optimizer.param_groups:
                group["lr"] *= 0.5 + 0.1 * float(torch.rand(1))

        @trainer.on(Events.ITERATION_STARTED)
        def use(engine: Engine) -> None:
            """The newest evaluation decides in every step, also in the first one after a resume."""
            if engine.state.metrics.get("valid/loss", 9.0) < 0.5:
                run.optimizer.param_groups[0]["momentum"] = 0.5

        @trainer.on(Events.ITERATION_COMPLETED)
        def die(engine: Engine) -> None:
            if engine.state.iteration == self.dies_after:
                raise ValueError("on purpose")


def traces(folder: Path) -> list[str]:
    return [(folder / "small" / name).read_text() for name in ("ledger.jsonl", "metrics/train.jsonl")]


@pytest.mark.parametrize("dies_after", [7, pytest.param(13, marks=pytest.mark.slow)])
def test_handlers_of_evaluations_have_the_same_effect_after_a_kill(tmp_path: Path, dies_after: int) -> None:
    whole, dying, resumed = Halving(), Halving(dies_after), Halving()
    expected = trained(tmp_path / "whole", handlers=[whole], **OFTEN)
    with pytest.raises(ValueError, match="on purpose"):
        trained(tmp_path / "cut", handlers=[dying], **OFTEN)
    result = trained(tmp_path / "cut", handlers=[resumed], **OFTEN)
    assert [entry[:3] for entry in whole.seen] == [
        (3, 1, 1), (6, 2, 2), (9, 3, 3), (12, 3, 4), (15, 4, 5), (18, 5, 6), (20, 5, 7)
    ]  # fmt: skip
    assert whole.seen[-len(resumed.seen) :] == resumed.seen
    assert result["params_sha256"] == expected["params_sha256"]
    assert traces(tmp_path / "cut") == traces(tmp_path / "whole")


class Interruptible(Dataset[Any]):
    """Validation data that sends SIGTERM when it is read the next time, and waits until the run knows of it."""

    asked: Callable[[], bool] | None = None

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if (asked := Interruptible.asked) is not None:
            Interruptible.asked = None
            signal.raise_signal(signal.SIGTERM)
            while not asked():
                time.sleep(0.001)
        return points(12)[index]


def interrupted_after(step: int) -> Any:
    def interrupting(trainer: Engine, run: Run) -> None:
        @trainer.on(Events.ITERATION_COMPLETED(once=step))
        def arm() -> None:
            owners = (getattr(each.function, "__self__", None) for each in trainer.registrations())
            end = next(owner for owner in owners if isinstance(owner, StepEnd))
            Interruptible.asked = end.preemption.asked

    return interrupting


def test_an_interrupted_evaluation_is_followed_once_at_its_own_step(tmp_path: Path) -> None:
    whole, interrupted, resumed = Halving(), Halving(), Halving()
    fields: dict[str, Any] = {**OFTEN, "valid_data": Interruptible}
    trained(tmp_path / "whole", handlers=[whole], **fields)
    first = trained(tmp_path / "cut", handlers=[interrupted, interrupted_after(9)], **fields)
    assert (first["status"], first["step"], len(interrupted.seen)) == ("interrupted", 9, 2)
    trained(tmp_path / "cut", handlers=[resumed], **fields)
    assert interrupted.seen + resumed.seen == whole.seen
    assert traces(tmp_path / "cut") == traces(tmp_path / "whole")


def freezes_after_two(trainer: Engine, run: Run) -> None:
    @trainer.on(Events.STARTED)
    def prepare(engine: Engine) -> None:
        engine.state.layer = 0

    @trainer.on(RunEvents.EVALUATED(once=2))
    def freeze(engine: Engine) -> None:
        run.model[engine.state.layer].requires_grad_(False)
        run.model[1].momentum = 0.5


def test_layers_that_are_frozen_after_an_interrupted_evaluation_stay_frozen(tmp_path: Path) -> None:
    """STARTED comes before the evaluation that a resumed run does first, and EPOCH_STARTED after it."""
    fields: dict[str, Any] = {**OFTEN, "valid_data": Interruptible}
    trained(tmp_path / "whole", handlers=[freezes_after_two], **fields)
    first = trained(tmp_path / "cut", handlers=[freezes_after_two, interrupted_after(6)], **fields)
    assert (first["status"], first["step"]) == ("interrupted", 6)
    trained(tmp_path / "cut", handlers=[freezes_after_two], **fields)
    assert traces(tmp_path / "cut") == traces(tmp_path / "whole")


def prepares(trainer: Engine, run: Run) -> None:
    trainer.add_event_handler(Events.STARTED, lambda: setattr(trainer.state, "layer", 0))
    trainer.add_event_handler(RunEvents.EVALUATED, lambda: trainer.state.layer + 1)


def test_handlers_are_prepared_for_the_last_evaluation_too(tmp_path: Path) -> None:
    fields: dict[str, Any] = {**OFTEN, "valid_data": Interruptible}
    first = trained(tmp_path, handlers=[prepares, interrupted_after(20)], **fields)
    assert (first["status"], first["step"]) == ("interrupted", 20)
    assert trained(tmp_path, handlers=[prepares], **fields)["status"] == "completed"


def ends_after_two(trainer: Engine, run: Run) -> None:
    trainer.add_event_handler(RunEvents.EVALUATED(once=2), trainer.terminate)


def test_a_handler_may_end_the_run_also_when_the_evaluation_was_interrupted(tmp_path: Path) -> None:
    fields: dict[str, Any] = {**OFTEN, "valid_data": Interruptible}
    whole = trained(tmp_path / "whole", handlers=[ends_after_two], **fields)
    assert (whole["status"], whole["step"]) == ("completed", 6)
    first = trained(tmp_path / "cut", handlers=[ends_after_two, interrupted_after(6)], **fields)
    assert (first["status"], first["step"]) == ("interrupted", 6)
    for _ in range(2):  # the second one is over already
        result = trained(tmp_path / "cut", handlers=[ends_after_two], **fields)
        assert (result["step"], result["terminated"]) == (6, whole["terminated"])
        assert result["params_sha256"] == whole["params_sha256"]


def test_an_interrupted_evaluation_may_end_the_run_early(tmp_path: Path) -> None:
    early_stop = {"monitor": "loss", "patience": 1, "min_delta": 100.0}
    fields: dict[str, Any] = {**OFTEN, "valid_data": Interruptible, "early_stop": early_stop}
    whole = trained(tmp_path / "whole", **fields)
    assert (whole["status"], whole["step"]) == ("completed", 6)
    first = trained(tmp_path / "cut", handlers=[interrupted_after(6)], **fields)
    assert (first["status"], first["step"], "stopped" in first) == ("interrupted", 6, False)
    for _ in range(2):  # the second one is over already
        result = trained(tmp_path / "cut", **fields)
        assert (result["status"], result["step"], result["stopped"]) == ("completed", 6, whole["stopped"])


def test_a_checkpoint_of_the_step_that_ends_a_run_says_so(tmp_path: Path) -> None:
    """The process may be killed right after that checkpoint."""
    run = small_run(tmp_path)
    run.trainer.state.iteration = 3
    run.trainer.terminate()
    assert run.position()["terminated"] == run.length
    run.trainer.state.iteration = run.total_steps
    assert "terminated" not in run.position()


def plateau(optimizer: Any, total_steps: int) -> ReduceLROnPlateau:
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=0.9)


def plain_rates(steps: int, evaluate_every: int) -> list[float]:
    """Return the rates of a loop as people write it, over the same full batches."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = plateau(optimizer, steps)
    x, y = points(8).tensors  # type: ignore[attr-defined]
    valid_x, valid_y = points(12).tensors  # type: ignore[attr-defined]
    rates = []
    for step in range(1, steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        if step % evaluate_every == 0:
            schedule.step(nn.functional.mse_loss(model(valid_x), valid_y).item())
    return rates


def zeros() -> nn.Module:
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    return model


def test_the_rates_of_a_plateau_are_those_of_a_plain_loop_also_after_kills(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "model": zeros,
        "train_data": lambda: points(8),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "schedule": plateau,
        "max_epochs": None,
        "max_steps": 24,
        "checkpoint": {"every_steps": 3},
        "validate": {"every_steps": 2},
    }
    result = trained(tmp_path / "whole", **fields)
    lines = (tmp_path / "whole" / "small" / "metrics" / "train.jsonl").read_text().splitlines()
    expected = plain_rates(24, 2)
    assert [json.loads(line)["learning_rate"] for line in lines] == expected
    assert len(set(expected)) > 3
    for last in (4, 8, 13):
        with pytest.raises(ValueError, match="on purpose"):
            trained(tmp_path / "cut", **fields, handlers=[dies_after(last)])
    again = trained(tmp_path / "cut", **fields)
    assert again["params_sha256"] == result["params_sha256"]
    assert traces(tmp_path / "cut") == traces(tmp_path / "whole")


def test_a_plateau_goes_on_with_its_result_when_checkpoint_monitor_changes(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"schedule": plateau, "metrics": {"error": MeanAbsoluteError}, **OFTEN}
    whole = trained(tmp_path / "whole", **fields | {"checkpoint": {"every_steps": 2, "monitor": "error"}})
    with pytest.raises(ValueError, match="on purpose"):
        trained(
            tmp_path / "cut",
            handlers=[dies_after(9)],
            **fields | {"checkpoint": {"every_steps": 2, "monitor": "error"}},
        )
    with pytest.raises(ConfigError, match="schedule_monitor: expected 'error', which the schedule has followed"):
        trained(tmp_path / "cut", schedule_monitor="loss", **fields)
    changed = trained(tmp_path / "cut", **fields | {"checkpoint": {"every_steps": 2, "monitor": "loss"}})
    assert changed["params_sha256"] == whole["params_sha256"]
    assert traces(tmp_path / "cut") == traces(tmp_path / "whole")


def test_a_result_for_a_schedule_that_follows_none_is_refused(tmp_path: Path) -> None:
    def cosine(optimizer: Any, total_steps: int) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)

    with pytest.raises(ConfigError, match="schedule_monitor: expected None with CosineAnnealingLR"):
        small_run(tmp_path, schedule=cosine, schedule_monitor="loss")
