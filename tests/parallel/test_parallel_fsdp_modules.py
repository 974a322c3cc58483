"""Parameters that FSDP2 gathers module by module: what is in memory, and what is refused."""

import weakref
from typing import Any

import pytest
import torch
from ranks import Ranks
from slot_models import microbatch, slots_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from disttrain.backend.base import Backend
from disttrain.parallel import Slots, World, strategy_for

CPU = torch.device("cpu")


def sharded_gradients(model: nn.Module, slots: Slots, backend: Backend) -> Any:
    """Shard a model in place and return its gradients, which are gathered by module where each rank has one slot."""
    group: Any = backend.process_group
    world = World(slots=slots, device=CPU, process_group=group, fsdp_gather="module")
    return strategy_for("fsdp", model, world).gradients(model, seed=0)


def stack() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 31), nn.GELU(), nn.Dropout(0.2), nn.Linear(31, 17), nn.Tanh(), nn.Linear(17, 10))


def whole_gradients(backend: Backend) -> int:
    """Return the largest number of groups' whole gradients that were in memory at once during a step."""
    model = nn.Sequential(*[nn.Linear(12, 12) for _ in range(5)])
    slots = slots_of(backend, 2)
    gradients = sharded_gradients(model, slots, backend)
    arrived, seen, most = gradients.arrived, [], 0

    def watched(index: int, gradient: Tensor, out: Tensor) -> None:
        nonlocal most
        seen.append(weakref.ref(gradient))
        most = max(most, sum(one() is not None for one in seen))
        arrived(index, gradient, out)

    gradients.arrived = watched
    for x, y in gradients.microbatches([microbatch("mlp", 0, slot) for slot in slots.mine], 1):
        cross_entropy(gradients.module(x), y).backward()
    assert len(seen) == 5 * len(slots.mine)
    return most


def test_whole_gradients_are_freed_as_soon_as_they_are_sent(ranks: Ranks) -> None:
    assert max(ranks(2, whole_gradients)) <= 2  # FSDP2 keeps one while it sends the next


def without_backward(backend: Backend) -> str:
    model = stack()
    slots = slots_of(backend, 2)
    gradients = sharded_gradients(model, slots, backend)
    assert str(gradients.progress) == "no gradients yet"
    with pytest.raises(RuntimeError) as caught:
        for x, _ in gradients.microbatches([microbatch("mlp", 0, slots.rank)], 1):
            gradients.module(x)
    assert "of step 1 are on their way" in str(gradients.progress)
    return str(caught.value)


def test_a_step_without_a_backward_raises_an_error_that_says_so(ranks: Ranks) -> None:
    for message in ranks(2, without_backward):
        assert "expected the gradients of 3 groups of parameters, got 0" in message
