"""Forwards that sharded parameters do not allow are refused in the first steps, on one rank as on several."""

from typing import Any

import pytest
import torch
from ranks import Ranks
from slot_models import NEEDS_FSDP, refusals, slots_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from disttrain.backend.base import Backend
from disttrain.parallel import World, strategy_for


class Blocks(nn.Module):
    """Blocks that are groups; `how` says in which way they are used."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.still = nn.Linear(3, 3).requires_grad_(False)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        if self.how == "another block for some data" and x[0, 0] > 0:
            first = second
        if self.how == "reentrant":
            x = x.clone().requires_grad_(True)
            return checkpoint(second, checkpoint(second, first(x), use_reentrant=True), use_reentrant=True)
        if self.how == "functional":
            doubled = {name: 2 * parameter for name, parameter in first.named_parameters()}
            return second(torch.func.functional_call(first, doubled, (x,)))
        if self.how == "moves":
            with torch.no_grad():
                self.still.weight.mul_(0.5)
        return second(first(x).tanh()) + self.still(x)


def hook(model: Blocks) -> None:
    model.blocks[1].weight.register_hook(lambda gradient: gradient * 2)


def steps(backend: Backend, how: str, gather: Any, num_slots: int, when: str = "") -> str:
    """Run some steps; return the error, or the sum of all weights to the last bit."""
    model = Blocks(how)
    slots = slots_of(backend, num_slots)
    world = World(slots=slots, device=torch.device("cpu"), process_group=backend.process_group, fsdp_gather=gather)
    with refusals(backend) as told:
        if when == "built":
            hook(model)
        strategy = strategy_for("fsdp", model, world)
        gradients = strategy.gradients(model, seed=1)
        if when == "assembled":
            hook(model)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        for iteration in range(1, 4):
            batch = [torch.full((2, 3), 1.0 if slot == 1 else -0.5 * slot - 0.5) for slot in slots.mine]
            for x in gradients.microbatches(batch, iteration):
                gradients.module(x).square().mean().backward()
            optimizer.step()
    if told:
        return told[0]
    return " ".join(strategy.layout.whole(each.detach()).double().sum().item().hex() for each in model.parameters())


CASES = [(1, 2), pytest.param(2, 3, marks=NEEDS_FSDP), pytest.param(2, 2, marks=NEEDS_FSDP)]
"""(ranks, slots): one rank, some ranks with several slots, each rank with one."""


@pytest.mark.parametrize(("world_size", "num_slots"), CASES)
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("another block for some data", "expected every slot to call the same modules in the same order"),
        ("functional", "of Linear (blocks.0) was replaced for a call (functional_call"),
        ("moves", "changes its frozen parameter still.weight, of which each rank holds a part"),
        ("as usual", ""),
    ],
)
def test_a_gather_by_module_refuses_what_it_cannot_do(
    ranks: Ranks, how: str, told: str, world_size: int, num_slots: int
) -> None:
    messages = ranks(world_size, steps, how, "module", num_slots)
    assert all(told in message for message in messages)
    assert not told or all("fsdp" in message for message in messages)
    assert told or len(set(messages)) == 1


def test_a_gradient_that_arrives_in_parts_is_refused_by_module(ranks: Ranks) -> None:
    (message,) = ranks(1, steps, "reentrant", "module", 2)
    assert "arrives in 2 parts in one slot" in message
    assert "use_reentrant=False" in message


@NEEDS_FSDP
@pytest.mark.parametrize("how", ["another block for some data", "functional", "moves", "reentrant", "as usual"])
def test_a_gather_for_the_step_allows_them_all_with_the_bits_of_one_rank(ranks: Ranks, how: str) -> None:
    alone = ranks(1, steps, how, "step", 3)[0]
    assert alone.startswith(("0x", "-0x"))
    for world_size in (2, 3):
        assert ranks(world_size, steps, how, "step", 3) == [alone] * world_size


@pytest.mark.parametrize("when", ["built", "assembled"])
@pytest.mark.parametrize("gather", ["step", "module"])
@pytest.mark.parametrize(("world_size", "num_slots"), CASES)
def test_hooks_on_parameters_are_refused(ranks: Ranks, world_size: int, num_slots: int, gather: str, when: str) -> None:
    for message in ranks(world_size, steps, "as usual", gather, num_slots, when):
        assert "the parameter blocks.1.weight has a hook (register_hook)" in message
