"""LossLog: the same curve on any number of ranks, in few collectives, and an error for a loss that is not finite."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Ranks

from disttrain.backend import Backend, connect
from disttrain.engine import Engine, Events
from disttrain.errors import ConfigError, NonFiniteError
from disttrain.handlers.bad_steps import BadSteps
from disttrain.handlers.losses import LossLog, Pace, UpdateOutcome
from disttrain.handlers.values import KeptValues, keep

NUM_SLOTS, NUM_STEPS = 6, 7
# Values whose sum depends on the order in which they are added.
LOSSES = torch.rand(NUM_STEPS, NUM_SLOTS, generator=torch.Generator().manual_seed(1)) ** 9


def run_with(
    backend: Backend,
    losses: torch.Tensor,
    *,
    fetch_every: int = 3,
    stop_on_nan: bool = True,
    update: Callable[[int], UpdateOutcome] = lambda step: (None, None),
    none_at: int = 0,
) -> tuple[list[dict[str, Any]], list[Pace], str]:
    """Train for as many steps as there are rows, each rank with its columns; return the lines, paces and the error."""
    num_mine = losses.shape[1] // backend.world_size
    mine = losses[:, backend.rank * num_mine : (backend.rank + 1) * num_mine]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    lines: list[dict[str, Any]] = []
    paces: list[Pace] = []

    def fetched(new: list[dict[str, Any]], pace: Pace) -> None:
        lines.extend(new)
        paces.append(pace)

    log = LossLog(
        backend,
        optimizer,
        samples_per_step=12,
        update=lambda: update(trainer.state.iteration),
        bad_steps=BadSteps() if stop_on_nan else None,
        fetched=fetched,
    )
    trainer = Engine(lambda engine, i: [] if i + 1 == none_at else list(mine[i].unbind()))
    log.attach(trainer)

    @trainer.on(Events.ITERATION_COMPLETED)
    def schedule() -> None:
        optimizer.param_groups[0]["lr"] /= 2

    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=fetch_every), log.fetch)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, log.fetch)
    message = ""
    try:
        trainer.run(range(len(losses)), max_epochs=1)
    except NonFiniteError as error:
        message = str(error)
    return lines, paces, message


def folded(losses: torch.Tensor) -> list[float]:
    """Return the means over the slots, added by hand in slot order."""
    means = []
    for row in losses.double().tolist():
        total = 0.0
        for loss in row:
            total += loss
        means.append(total / len(row))
    return means


def run_with_values(
    backend: Backend, losses: torch.Tensor, weights: torch.Tensor, stray_at: tuple[int, int] | None = None
) -> tuple[list[dict[str, Any]], list[Pace], str]:
    """Train as `run_with`, each slot with a value beside its loss, and weights; `stray_at`: (step, slot) without it."""
    num_mine = losses.shape[1] // backend.world_size
    mine = range(backend.rank * num_mine, (backend.rank + 1) * num_mine)
    lines: list[dict[str, Any]] = []
    paces: list[Pace] = []

    def values() -> list[KeptValues]:
        step = trainer.state.iteration
        return [keep({} if (step, slot) == stray_at else {"ce": losses[step - 1, slot] ** 2}) for slot in mine]

    log = LossLog(
        backend,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        samples_per_step=12,
        weights=lambda: weights[trainer.state.iteration - 1].tolist()[mine.start : mine.stop],
        values=values,
        fetched=lambda new, pace: (lines.extend(new), paces.append(pace)),
    )
    trainer = Engine(lambda engine, i: [losses[i, slot] for slot in mine])
    log.attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=3), log.fetch)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, log.fetch)
    try:
        trainer.run(range(len(losses)), max_epochs=1)
    except ConfigError as error:
        return lines, paces, str(error)
    return lines, paces, ""


def test_values_are_folded_like_losses_on_any_number_of_ranks(ranks: Ranks) -> None:
    weights = torch.randint(3, LOSSES.shape, generator=torch.Generator().manual_seed(2))
    expected = []
    for row, of_step in zip((LOSSES**2).double().tolist(), weights.tolist(), strict=True):
        total = 0.0
        for value, weight in zip(row, of_step, strict=True):
            total += value * weight
        expected.append(total / sum(of_step))
    for world_size in (1, 2, 3):
        for lines, paces, message in ranks(world_size, run_with_values, LOSSES, weights):
            assert message == ""
            assert [line["ce"] for line in lines] == expected
            assert [pace.values for pace in paces] == [{"ce": expected[step - 1]} for step in (3, 6, 7)]


def test_a_slot_without_its_value_stops_all_ranks_with_one_message(ranks: Ranks) -> None:
    ones = torch.ones(LOSSES.shape, dtype=torch.int64)
    expected = "got 'ce' in slot 0 of step 1 but not in slot 5 of step 5;"
    messages = {
        message for world_size in (1, 2) for _, _, message in ranks(world_size, run_with_values, LOSSES, ones, (5, 5))
    }
    assert len(messages) == 1
    assert expected in messages.pop()


class SlotSums:
    """A metric for the window: the sum of the steps' numbers in each of this rank's slots."""

    def __init__(self, num_slots: int) -> None:
        self.sums = [0] * num_slots
        self.num_windows = 0

    def add(self, engine: Engine) -> None:
        self.sums = [total + engine.state.iteration for total in self.sums]

    def states(self) -> list[int]:
        return list(self.sums)

    def values(self, of_slots: list[int]) -> dict[str, Any]:
        return {"sums": of_slots}

    def begin_window(self) -> None:
        self.sums, self.num_windows = [0] * len(self.sums), self.num_windows + 1


def run_with_metrics(backend: Backend) -> tuple[list[Any], list[Any], int]:
    """Train 5 steps: log points at steps 2 and 4, a save at step 3, step 5 the last; return lines, paces, windows."""
    metrics = SlotSums(6 // backend.world_size)
    lines: list[dict[str, Any]] = []
    paces: list[Pace] = []
    log = LossLog(
        backend,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        samples_per_step=12,
        metrics=metrics,
        fetched=lambda new, pace: (lines.extend(new), paces.append(pace)),
    )
    trainer = Engine(lambda engine, i: [torch.ones(())] * (6 // backend.world_size))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, metrics.add)
    log.attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), log.fetch, log_point=True)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), log.fetch)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), log.fetch, is_last=True)
    trainer.run(range(5), max_epochs=1)
    return [line.get("sums") for line in lines], [dict(pace.values) for pace in paces], metrics.num_windows


def test_metrics_are_in_the_lines_of_log_points_and_a_save_ends_no_window(ranks: Ranks) -> None:
    of_steps = [None, [1 + 2] * 6, None, [3 + 4] * 6, [5] * 6]
    for world_size in (1, 3):
        for lines, values, num_windows in ranks(world_size, run_with_metrics):
            assert lines == of_steps
            assert values == [{"sums": of_steps[1]}, {}, {"sums": of_steps[3]}, {"sums": of_steps[4]}]
            assert num_windows == 2  # the last step ends none


def test_the_lines_are_the_same_on_any_number_of_ranks(ranks: Ranks) -> None:
    expected = [
        {"step": i + 1, "epoch": 1, "loss": loss, "grad_norm": None, "learning_rate": 0.5**i}
        for i, loss in enumerate(folded(LOSSES))
    ]
    for world_size in (1, 2, 3):
        for lines, paces, message in ranks(world_size, run_with, LOSSES):
            assert lines == expected
            assert [pace.step for pace in paces] == [3, 6, 7]
            assert [pace.grad_norm for pace in paces] == [None] * 3
            assert [(pace.loss, pace.learning_rate) for pace in paces] == [
                (expected[step - 1]["loss"], expected[step - 1]["learning_rate"]) for step in (3, 6, 7)
            ]
            assert all(pace.samples_per_second > 0 for pace in paces)
            assert message == ""


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_its_step(ranks: Ranks, bad: float) -> None:
    losses = LOSSES.clone()
    losses[4, 5] = bad  # of the last slot in step 5, which is not rank 0's
    for lines, _, message in ranks(2, run_with, losses):
        assert message.startswith(f"the loss became {bad} at step 5 (epoch 1)")
        assert [str(line["loss"]) for line in lines] == [
            *map(str, folded(LOSSES)[:4]),
            str(bad),
            str(folded(LOSSES)[5]),
        ]


def test_training_continues_without_bad_steps() -> None:
    losses = LOSSES.clone()
    losses[1, 0] = math.nan
    with connect("single") as backend:
        lines, paces, message = run_with(backend, losses, stop_on_nan=False)
    assert message == ""
    assert [line["step"] for line in lines if math.isnan(line["loss"])] == [2]
    assert len(lines) == NUM_STEPS
    assert math.isfinite(paces[0].loss)


def test_a_fetch_without_new_steps_reports_nothing() -> None:
    with connect("single") as backend:
        _, paces, _ = run_with(backend, LOSSES[:6], fetch_every=3)
    assert [pace.step for pace in paces] == [3, 6]  # and not once more at the epoch's end


def updates(step: int) -> UpdateOutcome:
    """Step 4 is left out whole, step 6 because its gradient overflowed."""
    return (None, "it was bad") if step == 4 else (torch.tensor(math.inf if step == 6 else step / 8), None)


def test_lines_have_norms_and_a_step_that_was_left_out_has_no_loss_and_no_norm(ranks: Ranks) -> None:
    for world_size in (1, 2):
        for lines, paces, message in ranks(world_size, run_leaving_out, LOSSES):
            losses = folded(LOSSES)
            assert [line["loss"] for line in lines[:6]] == [*losses[:3], None, *losses[4:6]]
            assert [line["grad_norm"] for line in lines[:6]] == [1 / 8, 2 / 8, 3 / 8, None, 5 / 8, math.inf]
            assert [line.get("left_out") for line in lines[:6]] == [None] * 3 + ["it was bad"] + [None] * 2
            assert message.startswith("the gradient's norm became inf at step 6 (epoch 1)")
            assert paces[1].loss == losses[5]
            assert [pace.grad_norm for pace in paces[:2]] == [3 / 8, math.inf]


def run_leaving_out(backend: Backend, losses: torch.Tensor) -> Any:
    return run_with(backend, losses, update=updates, none_at=4)
