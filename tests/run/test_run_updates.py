"""The actions around each update: the norm, clipping, waits, the schedule, and updates that are left out."""

import logging
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from disttrain.engine import Engine, Events
from disttrain.errors import ConfigError
from disttrain.parallel import ReplicatedLayout
from disttrain.run.updates import Updates


class Schedule:
    """A schedule that counts its steps."""

    def __init__(self) -> None:
        self.num_steps = 0

    def step(self) -> None:
        self.num_steps += 1


def model_with_gradient(*values: float) -> nn.Module:
    model = nn.Linear(len(values), 1, bias=False)
    model.weight.grad = torch.tensor([values])
    return model


def updates(model: nn.Module, **changes: Any) -> Updates:
    defaults: dict[str, Any] = {"seed": 3, "on_nan": "stop", "grad_clip_norm": None, "left_out": {}}
    schedule = changes.pop("schedule", None)
    return Updates(model, ReplicatedLayout(), schedule, **(defaults | changes))


def test_the_norm_is_measured_before_clipping_and_returned_once() -> None:
    model = model_with_gradient(3.0, 4.0)
    clipping = updates(model, grad_clip_norm=1.0)
    assert clipping.before_step() is None
    norm, reason = clipping.take()
    assert norm is not None
    assert (norm.item(), reason) == (5.0, None)
    assert clipping.take() == (None, None)
    gradient = model.get_parameter("weight").grad
    assert gradient is not None
    assert torch.linalg.vector_norm(gradient).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("on_nan", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_only_skip_leaves_out_an_update_whose_gradient_is_not_finite(on_nan: Any, value: float) -> None:
    expected = False if on_nan == "skip" and not math.isfinite(value) else None
    assert updates(model_with_gradient(value), on_nan=on_nan).before_step() is expected


def test_the_waits_of_an_update_are_called_before_it() -> None:
    waiting = updates(model_with_gradient(1.0))
    called: list[str] = []
    waiting.before_update += [lambda: called.append("first"), lambda: called.append("second")]
    waiting.before_step()
    assert called == ["first", "second"]


class Plateau:
    """A schedule that follows a value."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self, metrics: float) -> None:
        self.values.append(metrics)


def test_a_schedule_whose_step_needs_a_value_steps_after_evaluations_alone() -> None:
    schedule = Plateau()
    following = updates(model_with_gradient(1.0), schedule=schedule, monitor="accuracy")
    following.before_step()
    following.after_step(True)
    assert schedule.values == []
    following.evaluated({"loss": 3.0, "accuracy": 0.5})
    following.evaluated({"loss": 2.0, "accuracy": 0.75})
    assert schedule.values == [0.5, 0.75]


def test_a_schedule_goes_on_with_the_result_that_it_has_followed() -> None:
    following = updates(model_with_gradient(1.0), schedule=Plateau(), monitor="loss")
    following.follow(None, None)  # a new run
    assert following.monitor == "loss"
    following.follow("accuracy", None)
    following.follow("accuracy", "accuracy")
    assert following.monitor == "accuracy"
    with pytest.raises(ConfigError, match="schedule_monitor: expected 'accuracy', which the schedule has followed"):
        following.follow("accuracy", "loss")


def test_a_schedule_cannot_follow_a_list() -> None:
    following = updates(model_with_gradient(1.0), schedule=Plateau(), monitor="by_class")
    with pytest.raises(ConfigError, match=r"schedule_monitor='by_class': expected a result that is one number"):
        following.evaluated({"loss": 1.0, "by_class": [0.5, 0.25]})


def test_other_schedules_do_not_step_after_an_evaluation() -> None:
    schedule = Schedule()
    updates(model_with_gradient(1.0), schedule=schedule).evaluated({"loss": 3.0})
    assert schedule.num_steps == 0


@pytest.mark.parametrize("draw", [lambda: torch.rand(2).tolist(), lambda: np.random.rand(2).tolist(), random.random])
def test_what_handlers_and_the_update_draw_depends_on_the_step_alone(draw: Any) -> None:
    drawn: dict[tuple[str, int], list[Any]] = {}
    for num_slots in (1, 3):  # a rank with more slots has drawn more before its update
        drawing = updates(model_with_gradient(1.0))
        drawing.before_update.append(lambda e=drawing: drawn.setdefault(("update", e._step), []).append(draw()))

        def step(engine: Engine, batch: int, e: Updates = drawing, n: int = num_slots) -> None:
            for _ in range(n):
                draw()
            e.before_step()

        engine = Engine(step)  # type: ignore[arg-type]
        drawing.attach(engine)
        engine.add_event_handler(
            Events.ITERATION_STARTED, lambda e: drawn.setdefault(("begins", e.state.iteration), []).append(draw())
        )
        engine.run([0, 0], max_epochs=1)
    assert len(drawn) == 4
    assert all(first == second for first, second in drawn.values())
    assert len({str(values) for values in drawn.values()}) == 4


def test_the_schedule_steps_only_with_the_optimizer_and_skipped_steps_count(caplog: pytest.LogCaptureFixture) -> None:
    schedule = Schedule()
    counting = updates(model_with_gradient(math.nan), schedule=schedule, left_out={3: "the loss became nan"})

    def step(engine: Engine, stepped: bool) -> None:
        counting.before_step()
        counting.after_step(stepped)

    engine = Engine(step)  # type: ignore[arg-type]
    counting.attach(engine)
    reasons = []
    engine.add_event_handler("iteration_completed".upper(), lambda: reasons.append(counting.take()[1]))
    with caplog.at_level(logging.WARNING):
        engine.run([True, False, True, True], max_epochs=1)
    assert schedule.num_steps == 3
    assert counting.num_skipped == 2
    assert reasons == [None, "its gradient's norm is nan", "the loss became nan", None]
    assert [record.getMessage() for record in caplog.records] == [
        "step 2 is left out: its gradient's norm is nan",
        "step 3 is left out: the loss became nan when it was first done",
    ]
    assert [counting.leaves_out(step) for step in (2, 3)] == [False, True]
