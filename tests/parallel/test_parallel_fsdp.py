"""Training by slots with sharded parameters on real ranks: the bits of one process that holds all of them."""

import hashlib
import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from ranks import Ranks
from slot_models import microbatch, slots_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from disttrain.backend.base import Backend
from disttrain.parallel import Layout, Slots, Strategy, World, strategy_for
from disttrain.precision import choose_precision

CPU = torch.device("cpu")
STEPS = 2


class Block(nn.Module):
    """A block with sizes that no number of ranks divides, and a layer that only even slots use."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(13)
        self.up = nn.Linear(13, 29)
        self.down = nn.Linear(29, 13, bias=False)
        self.sometimes = nn.Linear(13, 13)

    def forward(self, x: Tensor, even: bool) -> Tensor:
        hidden = x + self.down(self.up(self.norm(x)).relu())
        return self.sometimes(hidden) if even else hidden


class Odd(nn.Module):
    """Blocks in a list, one called twice; tied weights, BatchNorm, dropout, a frozen layer and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twin = nn.Linear(12, 13, bias=False), nn.Linear(12, 13, bias=False)
        self.twin.weight = self.embed.weight
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.norm = nn.BatchNorm1d(13)
        self.dropout = nn.Dropout(0.1)
        self.frozen = nn.Linear(13, 13).requires_grad_(False)
        self.head = nn.Linear(13, 10)
        self.never = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        even = bool(x[0, 0] > 0)  # `microbatch` makes it positive for even slots
        hidden = self.embed(x) + 0.5 * self.twin(x)
        for block in (*self.blocks, self.blocks[1]):
            hidden = block(hidden, even)
        return self.head(self.frozen(self.dropout(self.norm(hidden))).tanh())


class Recomputed(nn.Module):
    """Blocks whose activations are computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 13)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(13, 10)

    def forward(self, x: Tensor) -> Tensor:
        even, hidden = bool(x[0, 0] > 0), self.embed(x)
        for block in self.blocks:
            hidden = self.dropout(checkpoint(block, hidden, even, use_reentrant=False))
        return self.head(hidden)


class Inplace(nn.Module):
    """Linear layers with three-dimensional inputs; their outputs are views, which are changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 11) for width in (1, 11, 11))
        self.head = nn.Linear(11, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(-1)
        for layer in self.layers:
            x = layer(x)
            x += 0.5
            x = x.tanh()
        return self.head(x.mean(1))


def stack() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 31), nn.GELU(), nn.Dropout(0.2), nn.Linear(31, 17), nn.Tanh(), nn.Linear(17, 10))


MODELS = {"odd": Odd, "inplace": Inplace, "recomputed": Recomputed, "stack": stack, "bf16": stack, "fast": stack}


def strategy_of(
    model: nn.Module, slots: Slots, backend: Backend, strategy: Any = "fsdp", reduction: Any = "invariant"
) -> Strategy:
    name, gather = ("fsdp", "module") if strategy == "by module" else (strategy, "step")
    group: Any = backend.process_group
    world = World(slots=slots, device=CPU, process_group=group, reduction=reduction, fsdp_gather=gather)
    return strategy_for(name, model, world)


def layout_of(model: nn.Module, slots: Slots, backend: Backend) -> Layout:
    return strategy_of(model, slots, backend).layout


def bits(tensor: Tensor) -> str:
    """Hash every bit of a tensor, including the sign of a zero."""
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:12]


def train(name: str, slots: Slots, backend: Backend, strategy: str) -> dict[str, Any]:
    """Train as a run does, with evaluations in between; return the hashes of the whole tensors, by name."""
    torch.manual_seed(7)
    model = MODELS[name]()
    reduction: Any = "fast" if name == "fast" else "invariant"
    chosen = strategy_of(model, slots, backend, strategy, reduction)
    layout = chosen.layout
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    layout.check_optimizer(optimizer)
    torch.manual_seed(slots.rank)  # nothing may depend on it
    gradients = chosen.gradients(model, seed=3)
    results: dict[str, Any] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = [microbatch("mixed", step, slot) for slot in slots.mine]
        for x, y in gradients.microbatches(batch, step + 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
                loss = cross_entropy(gradients.module(x), y)
            loss.backward()
        trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
        results |= {f"{step} {name}": bits(layout.whole(p.grad)) for name, p in trained.items() if p.grad is not None}
        norm = layout.total_norm([p.grad for p in trained.values() if p.grad is not None])
        layout.clip(list(trained.values()), 0.5, norm)
        results[f"{step} norm"] = norm.item().hex()
        optimizer.step()
        model.eval()
        with torch.no_grad(), layout.gathered():
            for _ in range(slots.rank):  # another number of calls on each rank
                model(batch[0][0])
        model.train()
    for name, tensor in model.state_dict().items():
        results[name] = bits(layout.whole(tensor))
    for index, values in optimizer.state_dict()["state"].items():
        results |= {f"{index} {key}": bits(layout.whole(value)) for key, value in values.items()}
    return results


def trained(backend: Backend, names: tuple[str, ...], num_slots: int, strategy: str) -> list[dict[str, Any]]:
    return [train(name, slots_of(backend, num_slots), backend, strategy) for name in names]


@lru_cache
def of_one_process(ranks: Ranks, names: tuple[str, ...], num_slots: int) -> list[dict[str, Any]]:
    by_model: list[dict[str, Any]] = ranks(1, trained, names, num_slots, "ddp")[0]
    return by_model


# 3 of 8: some ranks run 2 slots, others 3.
@pytest.mark.parametrize(
    ("world_size", "num_slots", "strategy"),
    [
        *((size, 8, "fsdp") for size in (1, 2, 3)),
        *(pytest.param(size, 8, "fsdp", marks=pytest.mark.slow) for size in (4, 5, 8)),
        (3, 3, "fsdp"),
        (3, 3, "by module"),
    ],
)
def test_every_bit_is_that_of_one_process_without_shards(
    ranks: Ranks, world_size: int, num_slots: int, strategy: str
) -> None:
    names = ("odd", "inplace", "recomputed", "stack", "bf16")
    alone = of_one_process(ranks, names, num_slots)
    assert len({one["1 norm"] for one in alone}) == len(names)
    for by_model in ranks(world_size, trained, names, num_slots, strategy):
        for name, expected, got in zip(names, alone, by_model, strict=True):
            assert {key: got[key] for key in expected} == expected, name
            assert got.keys() == expected.keys()


def test_the_fast_reduction_agrees_and_repeats(ranks: Ranks) -> None:
    (alone,) = of_one_process(ranks, ("fast",), 4)
    for world_size in (2, 3):
        by_rank = [results for (results,) in ranks(world_size, trained, ("fast",), 4, "fsdp")]
        assert all(results == by_rank[0] for results in by_rank)
        for step in range(STEPS):
            expected, got = (float.fromhex(results[f"{step} norm"]) for results in (alone, by_rank[0]))
            assert math.isclose(got, expected, rel_tol=1e-4)
    assert ranks(3, trained, ("fast",), 4, "fsdp")[0][0] == by_rank[0]


def overflow(backend: Backend, bad_rank: int) -> list[Any]:
    """Make two updates, the first with an infinite element on one rank; return (stepped, unchanged) of each."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False))
    layout = layout_of(model, slots_of(backend, 2), backend)
    precision = choose_precision("fp16", CPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    precision.backward(torch.zeros((), requires_grad=True), optimizer)  # it makes the scale
    updates = []
    for bad in (True, False):
        for parameter in model.parameters():
            before = layout.whole(parameter.detach()).clone()
            parameter.grad = torch.ones_like(parameter)
            local: Any = parameter.grad
            if bad and backend.rank == bad_rank:
                local.to_local()[0, 0] = math.inf
        stepped = precision.update(optimizer, lambda: None)
        updates.append((stepped, torch.equal(before, layout.whole(parameter.detach()))))
    return updates


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_an_overflow_in_one_shard_skips_the_update_on_all_ranks(ranks: Ranks, bad_rank: int) -> None:
    assert ranks(2, overflow, bad_rank) == [[(False, True), (True, False)]] * 2
