"""The end of a step: everything that is due, its order, and the rest that the last step leaves."""

import itertools
import math
import signal
import time
from typing import Any

import pytest
import torch

from disttrain.backend import connect
from disttrain.engine import Engine
from disttrain.errors import NonFiniteError
from disttrain.handlers.bad_steps import BadSteps
from disttrain.handlers.best import Best
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
    sigterm_in: str = "",
    unvalidated: bool = False,
    slow_step_s: float = math.inf,
    best: Best | None = None,
    grace_s: float = math.inf,
) -> tuple[list[str], StepEnd]:
    """Train epochs of four steps; return the actions, such as "save 4", and the handler.

    SIGTERM comes in step `sigterm_at`, or in the middle of the action `sigterm_in`. `unvalidated`: the run resumes from
    a step that was saved before it was evaluated.
    """
    done: list[str] = []

    def send_sigterm() -> None:
        signal.raise_signal(signal.SIGTERM)
        while not preemption.asked():
            time.sleep(0.001)

    def step(engine: Engine, batch: Any) -> list[torch.Tensor]:
        if engine.state.iteration == sigterm_at:
            send_sigterm()
        return [torch.tensor(loss)]

    def validating(engine: Engine) -> dict[str, Any] | None:
        done.append(f"validate {engine.state.iteration}")
        if done[-1] == sigterm_in:
            send_sigterm()
            done[-1] += " in part"
            return None
        return {"loss": float(engine.state.iteration)}

    def saving(engine: Engine, left_s: float) -> bool:
        done.append(f"save {engine.state.iteration}")
        if done[-1] == sigterm_in:
            send_sigterm()
        done[-1] += " in a hurry" * (left_s < math.inf)
        return True

    with connect("single") as backend, Preemption(backend, slow_step_s=slow_step_s) as preemption:
        preemption.grace_s = grace_s
        losses = LossLog(
            backend,
            torch.optim.SGD([torch.zeros(1)], lr=0.1),
            samples_per_step=1,
            bad_steps=BadSteps(),
            fetched=lambda lines, pace: done.append(f"fetch {lines[0]['step']}-{lines[-1]['step']}"),
        )
        end = StepEnd(
            losses,
            preemption,
            save=saving,
            validate=validating,
            total_steps=max_steps,
            log_every_steps=log,
            save_every_steps=save,
            validate_every_steps=validate,
            pass_ends=(lambda: trainer.state.iteration in passes_end_at) if passes_end_at else None,
            best=best,
        )
        trainer = Engine(step)
        losses.attach(trainer)
        end.attach(trainer)
        if resume_at:
            trainer.load_state_dict({"iteration": resume_at, "max_iters": max_steps, "epoch_length": EPOCH})
            end.resumed_at(resume_at)
        if unvalidated:
            end.catch_up(trainer)
        if resume_at < max_steps and not end.interrupted:
            if passes_end_at:
                trainer.run(itertools.count(), max_iters=max_steps)
            else:
                trainer.run(range(EPOCH), max_iters=max_steps, epoch_length=EPOCH)
        if not end.interrupted:
            end.finish(trainer)
    return done, end


def test_by_default_everything_is_done_in_order_at_the_end_of_each_epoch() -> None:
    done, end = train()
    assert done == ["fetch 1-4", "validate 4", "save 4", "fetch 5-8", "validate 8", "save 8"]
    assert end.metrics == {"loss": 8.0}
    assert not end.interrupted


def test_passes_whose_length_is_known_only_at_their_end() -> None:
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


def test_actions_are_done_every_given_number_of_steps() -> None:
    done, _ = train(log=2, save=3, validate=5)
    # A save fetches first, so no checkpoint holds a state that followed a bad loss.
    assert done == [
        *("fetch 1-2", "fetch 3-3", "save 3", "fetch 4-4"),
        *("validate 5", "fetch 5-6", "save 6", "fetch 7-8", "validate 8", "save 8"),
    ]


def test_a_run_that_ends_inside_an_epoch_is_finished_too() -> None:
    done, _ = train(max_steps=6)
    assert done == ["fetch 1-4", "validate 4", "save 4", "fetch 5-6", "validate 6", "save 6"]


def without_fetches(done: list[str]) -> list[str]:
    return [action for action in done if "fetch" not in action]


def test_the_best_evaluation_so_far_is_saved_too() -> None:
    # The loss of an evaluation is its step's number.
    assert without_fetches(train(save=4, validate=3, best=Best("loss", "min"))[0]) == [
        *("validate 3", "save 3", "save 4", "validate 6", "validate 8", "save 8"),
    ]
    assert without_fetches(train(save=4, validate=3, best=Best("loss", "max"))[0]) == [
        *("validate 3", "save 3", "save 4", "validate 6", "save 6", "validate 8", "save 8"),
    ]


def test_a_step_that_was_saved_before_it_turned_out_to_be_the_best_is_saved_again() -> None:
    # Its first checkpoint does not hold that it is the best.
    done, _ = train(resume_at=8, unvalidated=True, best=Best("loss", "min"))
    assert done == ["validate 8", "save 8"]
    assert train(resume_at=8, unvalidated=True)[0] == ["validate 8"]


def test_no_checkpoint_is_made_after_a_loss_that_is_not_finite() -> None:
    with pytest.raises(NonFiniteError, match="at step 1 "):
        train(loss=float("nan"), save=2)


def test_only_a_save_after_a_signal_that_another_launch_will_continue_hurries() -> None:
    assert train(sigterm_at=2, grace_s=60)[0] == ["fetch 1-3", "save 3 in a hurry"]
    assert train(sigterm_at=8, grace_s=60)[0][-2:] == ["validate 8", "save 8"]
    assert train(sigterm_in="validate 8", grace_s=60)[0][-2:] == ["validate 8 in part", "save 8 in a hurry"]
    assert train(grace_s=60)[0][-1] == "save 8"


def test_after_a_signal_the_next_step_is_saved_and_the_run_interrupted() -> None:
    done, end = train(sigterm_at=2)
    assert done == ["fetch 1-3", "save 3"]
    assert end.interrupted


def test_after_a_signal_in_a_slow_step_that_step_is_saved() -> None:
    done, end = train(sigterm_at=2, slow_step_s=0.0)
    assert done == ["fetch 1-2", "save 2"]
    assert end.interrupted


def test_after_a_signal_in_a_save_there_is_no_second_save() -> None:
    done, end = train(sigterm_in="save 3", save=3)
    assert done == ["fetch 1-3", "save 3"]
    assert end.interrupted
    done, end = train(sigterm_in="save 8", save=4)  # nothing is left to do
    assert done[-3:] == ["fetch 5-8", "validate 8", "save 8"]
    assert not end.interrupted


def test_an_interrupted_evaluation_is_done_first_by_the_resumed_run() -> None:
    done, end = train(sigterm_in="validate 4")
    assert done == ["fetch 1-4", "validate 4 in part", "save 4"]
    assert end.interrupted
    done, end = train(resume_at=4, unvalidated=True)
    assert done == ["validate 4", "fetch 5-8", "validate 8", "save 8"]
    assert not end.interrupted


@pytest.mark.parametrize("max_steps", [6, 8])
def test_an_evaluation_interrupted_at_the_last_step_is_left_to_the_next_launch(max_steps: int) -> None:
    done, end = train(sigterm_in=f"validate {max_steps}", max_steps=max_steps)
    assert done[-2:] == [f"validate {max_steps} in part", f"save {max_steps}"]
    assert end.interrupted
    done, end = train(resume_at=max_steps, max_steps=max_steps, unvalidated=True)
    assert done == [f"validate {max_steps}"]
    assert not end.interrupted


def test_an_evaluation_that_is_interrupted_again_saves_nothing() -> None:
    done, end = train(resume_at=4, unvalidated=True, sigterm_in="validate 4")
    assert done == ["validate 4 in part"]
    assert end.interrupted


@pytest.mark.parametrize("sigterm_at", [7, 8])
def test_a_signal_in_the_last_steps_does_not_interrupt_the_run(sigterm_at: int) -> None:
    done, end = train(sigterm_at=sigterm_at)
    assert done == ["fetch 1-4", "validate 4", "save 4", "fetch 5-8", "validate 8", "save 8"]
    assert not end.interrupted


def test_a_resumed_run_does_not_save_its_checkpoint_again() -> None:
    assert train(resume_at=4)[0] == ["fetch 5-8", "validate 8", "save 8"]
    assert train(resume_at=8)[0] == ["validate 8"]  # completed, but killed before its result was written


@pytest.mark.parametrize(
    ("every", "step", "epoch_ends", "expected"),
    [(0, 3, False, False), (0, 4, True, True), (3, 3, False, True), (3, 4, True, False)],
)
def test_due(every: int, step: int, epoch_ends: bool, expected: bool) -> None:
    assert due(every, step, epoch_ends) is expected
