"""The end of a step: what is due, in which order, and what the last step leaves to do."""

import itertools
import signal
from typing import Any

import pytest
import torch

from disttrain.backend import connect
from disttrain.engine import Engine
from disttrain.errors import NonFiniteError
from disttrain.handlers.losses import LossLog
from disttrain.handlers.preemption import Preemption
from disttrain.handlers.step_end import StepEnd, due

EPOCH = 4


def train(
    *,
    log: int = 100,
    save: int = 0,
    validate: int = 0,
    max_steps: int = 8,
    resume_at: int = 0,
    loss: float = 1.0,
    sigterm_at: int | None = None,
    passes_end_at: tuple[int, ...] = (),
) -> tuple[list[str], StepEnd]:
    """Train epochs of four steps; return what was done, such as "save 4", and the handler."""
    done: list[str] = []

    def step(engine: Engine, batch: Any) -> list[torch.Tensor]:
        if engine.state.iteration == sigterm_at:
            signal.raise_signal(signal.SIGTERM)
        return [torch.tensor(loss)]

    def validating(engine: Engine) -> dict[str, Any]:
        done.append(f"validate {engine.state.iteration}")
        return {"loss": float(engine.state.iteration)}

    with connect("single") as backend, Preemption(backend) as preemption:
        losses = LossLog(
            backend,
            torch.optim.SGD([torch.zeros(1)], lr=0.1),
            samples_per_step=1,
            stop_on_nan=True,
            fetched=lambda lines, pace: done.append(f"fetch {lines[0]['step']}-{lines[-1]['step']}"),
        )
        end = StepEnd(
            losses,
            preemption,
            save=lambda engine: done.append(f"save {engine.state.iteration}"),
            validate=validating,
            total_steps=max_steps,
            log_every_steps=log,
            save_every_steps=save,
            validate_every_steps=validate,
            pass_ends=(lambda: trainer.state.iteration in passes_end_at) if passes_end_at else None,
        )
        trainer = Engine(step)
        losses.attach(trainer)
        end.attach(trainer)
        if resume_at:
            trainer.load_state_dict({"iteration": resume_at, "max_iters": max_steps, "epoch_length": EPOCH})
            end.resumed_at(resume_at)
        if resume_at < max_steps:
            if passes_end_at:
                trainer.run(itertools.count(), max_iters=max_steps)
            else:
                trainer.run(range(EPOCH), max_iters=max_steps, epoch_length=EPOCH)
        if not end.interrupted:
            end.finish(trainer)
    return done, end


def test_by_default_all_happens_at_each_epochs_end_and_in_order() -> None:
    done, end = train()
    assert done == ["fetch 1-4", "validate 4", "save 4", "fetch 5-8", "validate 8", "save 8"]
    assert end.metrics == {"loss": 8.0}
    assert not end.interrupted


def test_passes_whose_length_shows_at_their_end() -> None:
    done, end = train(passes_end_at=(3, 4))
    expected = ["fetch 1-3", "validate 3", "save 3", "fetch 4-4", "validate 4", "save 4"]
    assert done == [*expected, "fetch 5-8", "validate 8", "save 8"]
    assert train(passes_end_at=(3, 8), log=2, save=4)[0] == [
        *["fetch 1-2", "fetch 3-3", "validate 3", "fetch 4-4", "save 4"],
        *["fetch 5-6", "fetch 7-8", "validate 8", "save 8"],
    ]
    assert not end.interrupted


def test_a_stop_at_a_passes_end() -> None:
    done, end = train(passes_end_at=(3,), sigterm_at=2, max_steps=5)
    assert end.interrupted
    assert done == ["fetch 1-3", "validate 3", "save 3"]


def test_every_so_many_steps() -> None:
    done, _ = train(log=2, save=3, validate=5)
    # A save fetches first, so that no checkpoint is made of a state that followed a bad loss.
    assert done == [
        *("fetch 1-2", "fetch 3-3", "save 3", "fetch 4-4"),
        *("validate 5", "fetch 5-6", "save 6", "fetch 7-8", "validate 8", "save 8"),
    ]


def test_a_run_that_ends_inside_an_epoch_is_finished_too() -> None:
    done, _ = train(max_steps=6)
    assert done == ["fetch 1-4", "validate 4", "save 4", "fetch 5-6", "validate 6", "save 6"]


def test_no_checkpoint_is_made_after_a_loss_that_is_not_finite() -> None:
    with pytest.raises(NonFiniteError, match="at step 1 "):
        train(loss=float("nan"), save=2)


def test_asked_to_stop_it_saves_at_the_next_step_and_interrupts() -> None:
    done, end = train(sigterm_at=2)
    assert done == ["fetch 1-3", "save 3"]
    assert end.interrupted


@pytest.mark.parametrize("sigterm_at", [7, 8])
def test_asked_to_stop_at_the_very_end_it_finishes(sigterm_at: int) -> None:
    done, end = train(sigterm_at=sigterm_at)
    assert done == ["fetch 1-4", "validate 4", "save 4", "fetch 5-8", "validate 8", "save 8"]
    assert not end.interrupted


def test_a_resumed_run_saves_nothing_that_is_there_already() -> None:
    assert train(resume_at=4)[0] == ["fetch 5-8", "validate 8", "save 8"]
    assert train(resume_at=8)[0] == ["validate 8"]  # completed, but killed before its result was written


@pytest.mark.parametrize(
    ("every", "step", "epoch_ends", "expected"),
    [(0, 3, False, False), (0, 4, True, True), (3, 3, False, True), (3, 4, True, False)],
)
def test_due(every: int, step: int, epoch_ends: bool, expected: bool) -> None:
    assert due(every, step, epoch_ends) is expected
