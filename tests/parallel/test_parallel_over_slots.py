"""A step over slots: its seeds, its buffers, and how gradients are taken off the parameters."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disttrain.errors import ConfigError
from disttrain.parallel import GradientsOverSlots, Slots
from disttrain.parallel.buffers import SlotBuffers
from disttrain.parallel.rehearsal import Rehearsal
from disttrain.parallel.slot_checks import SlotChecks
from disttrain.seeding import seed_for


class Listed(GradientsOverSlots):
    """Gradients that do not meet: those of each slot are kept in a list."""

    def __init__(self, model: nn.Module, slots: Slots, *, rehearses: bool = False) -> None:
        super().__init__(model, slots, seed=5, process_group=None, device=None)
        self._buffers = SlotBuffers(model, slots, None)
        self._checks = SlotChecks(model)
        self._rehearsal = Rehearsal(model, rehearses=rehearses)
        self.by_slot: dict[int, list[Tensor]] = {}
        self.laid_out = 0

    def _lay_out(self) -> None:
        self.laid_out += 1

    def _step(self, batch: Sequence[Any], iteration: int) -> Iterator[Any]:
        for slot, microbatch in self._in_turn(batch, iteration):
            yield microbatch
            if not self._rehearsal.takes(self._trained.names, self._trained.tensors):
                self.by_slot[slot] = self._taken_off(self._trained.tensors)

    @property
    def unused(self) -> set[int]:
        return self._unused


class Noisy(nn.Module):
    """Its output depends on the seed, and on how often a slot was run since the step began."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (self.used * torch.rand(3) * self.calls * x).sum()


def run(gradients: Listed, iteration: int) -> list[bool]:
    """Run a step; return for each microbatch whether it was the rehearsal."""
    rehearsed = []
    batch = [torch.tensor(float(slot + 1)) for slot in gradients.slots.mine]
    for x in gradients.microbatches(batch, iteration):
        rehearsed.append(gradients.rehearsing)
        gradients.module(x).backward()
    return rehearsed


def expected(iteration: int, slot: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_for(5, "step", iteration - 1, slot))
    return torch.rand(3, generator=generator) * iteration * (slot + 1)


@pytest.mark.parametrize("rehearses", [False, True])
def test_each_slot_has_its_own_seed_and_the_buffers_of_the_step(rehearses: bool) -> None:
    """So a slot's gradient is the same on the rank that runs it alone and on one that runs all."""
    all_slots = Listed(Noisy(), Slots(4), rehearses=rehearses)
    by_rank = [Listed(Noisy(), Slots(4, rank, 2), rehearses=rehearses) for rank in (0, 1)]
    for iteration in (1, 2, 3):
        assert run(all_slots, iteration) == [True] * (rehearses and iteration == 1) + [False] * 4
        for gradients in by_rank:
            run(gradients, iteration)
        for slot in range(4):
            used, unused = all_slots.by_slot[slot]
            assert torch.equal(used, expected(iteration, slot))
            assert torch.equal(unused, torch.zeros(2))
            assert torch.equal(by_rank[slot // 2].by_slot[slot][0], used)
        assert all_slots.unused == {1}
        assert all(parameter.grad is None for parameter in all_slots.module.parameters())


def test_other_trained_parameters_are_laid_out_before_the_step() -> None:
    model = Noisy()
    gradients = Listed(model, Slots(2))
    run(gradients, 1)
    assert gradients.laid_out == 0
    model.unused.requires_grad_(False)
    run(gradients, 2)
    run(gradients, 3)
    assert gradients.laid_out == 1
    assert [len(each) for each in gradients.by_slot.values()] == [1, 1]


def test_a_sparse_gradient_is_refused() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    gradients = Listed(model, Slots(1))
    rows = torch.zeros(1, 1).to_sparse()
    with pytest.raises(ConfigError, match=r"of shape \[1, 1\] is sparse, and cannot be summed in a fixed order"):
        for _ in gradients.microbatches([0], 1):
            model[0].weight.grad = rows


def test_a_closed_one_has_released_its_model() -> None:
    gradients = Listed(Noisy(), Slots(2))
    gradients.close()
    gradients.close()
    assert isinstance(gradients.module, nn.Identity)


def test_a_watch_sees_each_microbatch_and_its_gradients() -> None:
    """Rehearsals too; the gradients that it sees are those that are taken off."""
    seen = []

    def watch(microbatches: Iterator[Any], iteration: int) -> Iterator[Any]:
        for microbatch in microbatches:
            yield microbatch
            assert model.used.grad is not None
            seen.append((iteration, gradients.rehearsing, model.used.grad.clone()))

    model = Noisy()
    gradients = Listed(model, Slots(2), rehearses=True)
    gradients.watch = watch
    assert run(gradients, 3) == [True, False, False]
    assert [(iteration, rehearsing) for iteration, rehearsing, _ in seen] == [(3, True), (3, False), (3, False)]
    for slot, (_, _, gradient) in enumerate(seen[1:]):
        assert torch.equal(gradient, gradients.by_slot[slot][0])
