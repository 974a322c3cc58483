"""Weighted slots: the mean over all targets of the global batch, however they lie in slots and on ranks."""

from typing import Any

import pytest
import torch
from ranks import Ranks
from slot_models import NEEDS_FSDP, digest, slots_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from disttrain.backend.base import Backend
from disttrain.parallel import SlotGradients, Slots, World, strategy_for
from disttrain.parallel.weights import SlotWeights

IGNORED = -100


def sentences(step: int) -> tuple[Tensor, Tensor]:
    """Return 12 sentences of 5 words and their targets, of which some count; those of the first three never do."""
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(7, (12, 5), generator=generator)
    targets = torch.randint(7, (12, 5), generator=generator)
    targets[torch.rand(12, 5, generator=generator) < 0.4] = IGNORED
    targets[:3] = IGNORED
    return words, targets


def model() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 7)).double()


def loss_of(net: nn.Module, words: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(net(words).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def count(microbatch: Any) -> int:
    return int((microbatch[1] != IGNORED).sum())


def trained(backend: Backend, num_slots: int, strategy: Any, gather: Any = "step") -> tuple[str, list[Tensor]]:
    """Return the hash of all weights, and the weights, after three steps."""
    net, slots = model(), slots_of(backend, num_slots)
    world = World(
        slots=slots,
        device=torch.device("cpu"),
        process_group=backend.process_group,
        fsdp_gather=gather,
        weight_of=count,
    )
    chosen = strategy_for(strategy, net, world)
    gradients: Any = chosen.gradients(net, seed=0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for step in range(3):
        words, targets = (each.chunk(num_slots) for each in sentences(step))
        for x, y in gradients.microbatches([(words[slot], targets[slot]) for slot in slots.mine], step + 1):
            loss_of(gradients.module, x, y).backward()
        assert gradients.weights.total == count(sentences(step))
        optimizer.step()
    whole = [chosen.layout.whole(each.detach()) for each in net.parameters()]
    holder = nn.ParameterList(whole)
    return digest(holder), whole


def by_hand() -> list[Tensor]:
    """Return the weights after three steps with the mean over all targets of the global batch."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(net, *sentences(step)).backward()
        optimizer.step()
    return [each.detach() for each in net.parameters()]


# With 4 slots, the first one has no target, so its mean and its gradient are nan.
@pytest.mark.parametrize("num_slots", [1, 2, 4, 12])
def test_the_gradient_is_the_mean_over_all_targets_whatever_the_slots(ranks: Ranks, num_slots: int) -> None:
    (_, weights), *_ = ranks(1, trained, num_slots, "ddp")
    for got, expected in zip(weights, by_hand(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("world_size", "strategy", "gather"),
    [
        (2, "ddp", "step"),
        (3, "ddp", "step"),
        *(pytest.param(size, "fsdp", "step", marks=NEEDS_FSDP) for size in (1, 2, 3)),
        pytest.param(4, "fsdp", "module", marks=NEEDS_FSDP),
    ],
)
def test_the_bits_are_the_same_on_any_number_of_ranks(
    ranks: Ranks, world_size: int, strategy: str, gather: str
) -> None:
    alone = ranks(1, trained, 4, "ddp")[0][0]
    assert [hashed for hashed, _ in ranks(world_size, trained, 4, strategy, gather)] == [alone] * world_size


def nothing_counts(backend: Backend) -> list[float]:
    net = model()
    gradients = SlotGradients(net, slots_of(backend, 2), seed=0, process_group=backend.process_group, weight_of=count)
    words, targets = sentences(0)
    none = torch.full_like(targets, IGNORED).chunk(2)
    for x, y in gradients.microbatches([(words.chunk(2)[slot], none[slot]) for slot in gradients.slots.mine], 1):
        loss_of(net, x, y).backward()
    assert gradients.weights.total == 0
    return [float(parameter.grad.abs().max()) for parameter in net.parameters() if parameter.grad is not None]


def test_where_nothing_counts_the_gradient_is_zero(ranks: Ranks) -> None:
    assert ranks(1, nothing_counts) + ranks(2, nothing_counts) == [[0.0] * 3] * 3


def test_short_floats_are_weighted_in_float32() -> None:
    weights = SlotWeights(Slots(1), None, lambda batch: 3, torch.device("cpu"))
    weights.begin(["batch"])
    (wide,) = weights.apply(0, [torch.tensor([1.00390625], dtype=torch.bfloat16) * 2])
    assert wide.dtype == torch.float32
    assert wide.item() == 3 * float(torch.tensor(1.00390625, dtype=torch.bfloat16) * 2)


def test_without_weights_each_slot_counts_once() -> None:
    weights = SlotWeights(Slots(5), None, None, torch.device("cpu"))
    weights.begin([])
    assert (weights.mine, weights.total, weights.divisor) == (None, 5, 5)
