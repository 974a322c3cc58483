"""Buffers over slots: each slot starts from the step's buffers, and every rank keeps those of slot 0."""

import pytest
import torch
from ranks import Ranks
from slot_models import slots_of
from torch import Tensor, nn

from disttrain.backend.base import Backend
from disttrain.errors import ConfigError
from disttrain.parallel import SlotGradients


class Statistics(nn.Module):
    """A layer with buffers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("flag", torch.tensor(False))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("short", torch.zeros(5, dtype=torch.bfloat16))
        self.register_buffer("replaced", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("passing", torch.zeros(1), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * x * self.count.item()
        with torch.no_grad():
            self.flag.fill_(not bool(self.flag))
            self.count += 1
            self.mean += x.mean()
            self.phase *= torch.polar(torch.ones(()), x.mean())
            self.short += x.sum()
            self.replaced = self.replaced + x[:2].double()
            self.passing += 1
        return y


def run(backend: Backend, num_slots: int, steps: int) -> tuple[dict[str, Tensor], list[float], bool]:
    model = Statistics()
    gradients = SlotGradients(model, slots_of(backend, num_slots), seed=0, process_group=backend.process_group)
    gradient_by_step = []
    for step in range(steps):
        batch = [torch.full((4,), float(10 * step + slot)) for slot in gradients.slots.mine]
        for x in gradients.microbatches(batch, step + 1):
            gradients.module(x).sum().backward()
        gradient_by_step.append(model.weight.grad.item())
    return model.state_dict(), gradient_by_step, model.passing.item() == 0.0


def expected(steps: int) -> dict[str, Tensor]:
    """Return the buffers after the forwards of slot 0 alone."""
    model = Statistics()
    for step in range(steps):
        model(torch.full((4,), 10.0 * step))
    return {name: tensor for name, tensor in model.state_dict().items() if name != "weight"}


def test_slot_zero_decides_on_every_rank(ranks: Ranks) -> None:
    for world_size in (1, 2, 3, 5):
        for state, gradient_by_step, passing_begins_anew in ranks(world_size, run, 5, 3):
            assert all(torch.equal(state[name], tensor) for name, tensor in expected(3).items())
            assert state.keys() == {*expected(3), "weight"}
            # The mean over the slots of 4 samples of 10 * step + slot, times the count with which each slot starts.
            assert gradient_by_step == [4.0 * (10 * step + 2) * step for step in range(3)]
            assert passing_begins_anew  # in each slot: no checkpoint holds a buffer that is not persistent


class Momentum(nn.Module):
    """A frozen teacher that the forward moves, in one of the ways that people write."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.student, self.teacher = nn.Linear(3, 2), nn.Linear(3, 2).requires_grad_(False)
        self.still = nn.Linear(2, 2).requires_grad_(False)
        self.how = how

    @torch.no_grad()
    def move(self, x: Tensor) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            if self.how == "in place":
                slow.lerp_(fast, 0.25)
            elif self.how == "by data":
                slow.data = slow.data * 0.75 + fast.data * 0.25
            elif self.how == "in its data":
                slow.data.mul_(0.75).add_(fast.data, alpha=0.25)
            elif x[0, 0] > 2:  # the data of some slots alone
                slow += x.mean()

    def forward(self, x: Tensor) -> Tensor:
        self.move(x)
        return (self.student(x) - self.teacher(x)).square().mean() + self.still(self.student(x)).mean()


def momentum(backend: Backend, how: str, num_slots: int) -> dict[str, Tensor]:
    model = Momentum(how)
    gradients = SlotGradients(model, slots_of(backend, num_slots), seed=0, process_group=backend.process_group)
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
    for step in range(4):
        batch = [torch.full((2, 3), float(step + slot)) for slot in gradients.slots.mine]
        for x in gradients.microbatches(batch, step + 1):
            gradients.module(x).backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("how", ["in place", "by data", "in its data", "by the data of a slot"])
def test_a_frozen_teacher_moves_as_buffers_do(ranks: Ranks, how: str) -> None:
    by_hand = Momentum(how)
    optimizer = torch.optim.SGD(by_hand.student.parameters(), lr=0.1)
    for step in range(4):  # every slot begins with the step's teacher, and slot 0 leaves the next one
        optimizer.zero_grad()
        start = [parameter.clone() for parameter in by_hand.teacher.parameters()]
        for slot in (2, 1, 0):
            for parameter, value in zip(by_hand.teacher.parameters(), start, strict=True):
                parameter.data.copy_(value)
            (by_hand(torch.full((2, 3), float(step + slot))) / 3).backward()
        optimizer.step()
    alone = ranks(1, momentum, how, 3)[0]
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(alone[name], tensor)
    for world_size in (2, 3):
        for state in ranks(world_size, momentum, how, 3):
            assert all(torch.equal(state[name], tensor) for name, tensor in alone.items())


def late(backend: Backend) -> str:
    model = Momentum("in place")
    gradients = SlotGradients(model, slots_of(backend, 2), seed=0, process_group=backend.process_group)
    move, model.move = model.move, lambda x: None
    for step in range(4):
        try:
            for x in gradients.microbatches([torch.ones(2, 3) for _ in gradients.slots.mine], step + 1):
                gradients.module(x).backward()
        except ConfigError as error:
            return f"step {step + 1}: {error}"
        if step == 2:
            model.move = move
    return ""


def test_a_teacher_that_moves_later_is_named(ranks: Ranks) -> None:
    for message in ranks(1, late) + ranks(2, late):
        assert message.startswith(
            "step 4: the model's forward changes its frozen parameter teacher.weight, but did not"
        )


def batch_norm(backend: Backend) -> list[Tensor]:
    model = nn.BatchNorm1d(2)
    gradients = SlotGradients(model, slots_of(backend, 4), seed=0, process_group=backend.process_group)
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4, 6, 2, generator=generator)
    for x in gradients.microbatches([samples[slot] for slot in gradients.slots.mine], 1):
        gradients.module(x).square().sum().backward()
    return [model.running_mean, model.running_var, model.num_batches_tracked, samples[0]]


def test_batch_norm_keeps_the_running_statistics_of_slot_zero(ranks: Ranks) -> None:
    for world_size in (1, 3, 4):
        for mean, variance, count, first in ranks(world_size, batch_norm):
            torch.testing.assert_close(mean, 0.1 * first.mean(0))
            torch.testing.assert_close(variance, 0.9 + 0.1 * first.var(0))
            assert count == 1
