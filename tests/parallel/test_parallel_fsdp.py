"""Training by slots with sharded parameters on real ranks: the bits of one process that holds all of them."""

import hashlib
import math
import weakref
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
from disttrain.errors import ConfigError
from disttrain.parallel import Layout, Slots, shard, slot_gradients
from disttrain.parallel.groups import groups_of
from disttrain.precision import choose

CPU = torch.device("cpu")
STEPS = 2


class Block(nn.Module):
    """Sizes that no number of ranks divides, and a layer that only even slots use."""

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
    """Blocks in a list, one called twice; tied weights, BatchNorm, dropout, a frozen layer and one that is not used."""

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
        even = bool(x[0, 0] > 0)  # the batch says whether its slot is even
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
    """Linear layers of three-dimensional inputs, whose outputs are views, changed in place."""

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


def layout_of(
    model: nn.Module, slots: Slots, backend: Backend, strategy: Any = "fsdp", reduction: Any = "invariant"
) -> Layout:
    return shard(model, strategy, slots, process_group=backend.process_group, reduction=reduction, device=CPU)


def sharded_gradients(model: nn.Module, slots: Slots, backend: Backend) -> Any:
    """Return the gradients of a model that is sharded here."""
    return slot_gradients(
        model,
        slots,
        seed=0,
        process_group=backend.process_group,
        gather=backend.gather_recorded,
        reduction="invariant",
        device=CPU,
        layout=layout_of(model, slots, backend),
    )


def bits(tensor: Tensor) -> str:
    """Hash every bit of a tensor, the sign of a zero included."""
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:12]


def train(name: str, slots: Slots, backend: Backend, strategy: str) -> dict[str, Any]:
    """Train as a recipe does, with an evaluation in between; return what came of it, by the hashes of whole tensors."""
    torch.manual_seed(7)
    model = MODELS[name]()
    reduction: Any = "fast" if name == "fast" else "invariant"
    layout = layout_of(model, slots, backend, strategy, reduction)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    layout.check_optimizer(optimizer)
    torch.manual_seed(slots.rank)  # nothing may depend on it
    gradients = slot_gradients(
        model,
        slots,
        seed=3,
        process_group=backend.process_group,
        gather=backend.gather_recorded,
        reduction=reduction,
        device=CPU,
        layout=layout,
    )
    found: dict[str, Any] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = [microbatch("mixed", step, slot) for slot in slots.mine]
        for x, y in gradients.microbatches(batch, step + 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
                loss = cross_entropy(gradients.module(x), y)
            loss.backward()
        trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
        found |= {f"{step} {name}": bits(layout.whole(p.grad)) for name, p in trained.items() if p.grad is not None}
        norm = layout.total_norm([p.grad for p in trained.values() if p.grad is not None])
        layout.clip(list(trained.values()), 0.5, norm)
        found[f"{step} norm"] = norm.item().hex()
        optimizer.step()
        model.eval()
        with torch.no_grad(), layout.gathered():
            for _ in range(slots.rank):  # each rank as often as it likes
                model(batch[0][0])
        model.train()
    for name, tensor in model.state_dict().items():
        found[name] = bits(layout.whole(tensor))
    for index, values in optimizer.state_dict()["state"].items():
        found |= {f"{index} {key}": bits(layout.whole(value)) for key, value in values.items()}
    return found


def trained(backend: Backend, names: tuple[str, ...], num_slots: int, strategy: str) -> list[dict[str, Any]]:
    return [train(name, slots_of(backend, num_slots), backend, strategy) for name in names]


@lru_cache
def of_one_process(ranks: Ranks, names: tuple[str, ...], num_slots: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ranks(1, trained, names, num_slots, "ddp")[0]
    return found


# 3 of 3: one slot a rank, where parameters are gathered twice a step; 3 of 8: some ranks run 2 slots, others 3.
@pytest.mark.parametrize(
    ("world_size", "num_slots"),
    [(1, 8), (2, 8), (3, 8), (3, 3), *(pytest.param(size, 8, marks=pytest.mark.slow) for size in (4, 5, 8))],
)
def test_every_bit_is_that_of_one_process_without_shards(ranks: Ranks, world_size: int, num_slots: int) -> None:
    names = ("odd", "inplace", "recomputed", "stack", "bf16")
    alone = of_one_process(ranks, names, num_slots)
    assert len({one["1 norm"] for one in alone}) == len(names)
    for by_model in ranks(world_size, trained, names, num_slots, "fsdp"):
        for name, expected, got in zip(names, alone, by_model, strict=True):
            assert {key: got[key] for key in expected} == expected, name
            assert got.keys() == expected.keys()


def test_the_fast_reduction_agrees_and_repeats(ranks: Ranks) -> None:
    (alone,) = of_one_process(ranks, ("fast",), 4)
    for world_size in (2, 3):
        by_rank = [found for (found,) in ranks(world_size, trained, ("fast",), 4, "fsdp")]
        assert all(found == by_rank[0] for found in by_rank)
        for step in range(STEPS):
            expected, got = (float.fromhex(found[f"{step} norm"]) for found in (alone, by_rank[0]))
            assert math.isclose(got, expected, rel_tol=1e-4)
    assert ranks(3, trained, ("fast",), 4, "fsdp")[0][0] == by_rank[0]


def sizes(backend: Backend) -> tuple[int, int, list[tuple[int, ...]]]:
    """Return how many elements of parameters and of optimizer states this rank holds, and the shapes it sees."""
    slots = slots_of(backend, 4)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    layout_of(model, slots, backend)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held: Any = list(model.parameters())
    states: Any = [value for kept in optimizer.state.values() for value in kept.values() if value.ndim]
    return (
        sum(part.to_local().numel() for part in held),
        sum(part.to_local().numel() for part in states),
        [tuple(part.shape) for part in held],
    )


def test_a_rank_holds_its_part_of_parameters_and_optimizer_states(ranks: Ranks) -> None:
    whole = 16 * 64 + 64 + 64 * 16 + 16
    assert ranks(2, sizes) == [(whole // 2, whole, [(64, 16), (64,), (16, 64), (16,)])] * 2


def whole_parameters(backend: Backend, num_slots: int) -> list[list[bool]]:
    """Return which layers' weights are there whole: before, in the midst of and after a forward, and after the step."""
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 10))
    slots = slots_of(backend, num_slots)
    gradients = sharded_gradients(model, slots, backend)
    seen: list[list[bool]] = []

    def look(*_: Any) -> None:
        seen.append([not hasattr(layer.weight, "to_local") for layer in model])

    look()
    model[1].register_forward_hook(look)  # runs when FSDP2's own hooks have, which came first
    batch = [microbatch("mlp", 0, slot) for slot in slots.mine]
    for x, y in gradients.microbatches(batch, 1):
        loss = cross_entropy(gradients.module(x), y)
        look()
        loss.backward()
    look()
    return seen


def test_parameters_are_gathered_group_by_group_or_for_a_step_of_several_slots(ranks: Ranks) -> None:
    none, every = [False] * 3, [True] * 3
    assert ranks(2, whole_parameters, 2) == [[none, none, none, none]] * 2
    assert ranks(2, whole_parameters, 4) == [[none, *[every] * 4, none]] * 2


def whole_gradients(backend: Backend, num_slots: int) -> int:
    """Return how many groups' whole gradients were there at once, at most, in a step."""
    model = nn.Sequential(*[nn.Linear(12, 12) for _ in range(5)])
    slots = slots_of(backend, num_slots)
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


def test_whole_gradients_go_as_soon_as_they_are_sent(ranks: Ranks) -> None:
    assert max(ranks(2, whole_gradients, 2)) <= 2  # FSDP2 keeps one while it sends the next
    assert ranks(2, whole_gradients, 4) == [10, 10]  # those of the slot before wait for their sum


def overflow(backend: Backend, where: int) -> list[Any]:
    """Scale gradients of which one element, on one rank, is not finite; return what came of each of two updates."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False))
    layout = layout_of(model, slots_of(backend, 2), backend)
    precision = choose("fp16", CPU)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    precision.backward(torch.zeros((), requires_grad=True), optimizer)  # which makes the scale
    found = []
    for bad in (True, False):
        for parameter in model.parameters():
            before = layout.whole(parameter.detach()).clone()
            parameter.grad = torch.ones_like(parameter)
            local: Any = parameter.grad
            if bad and backend.rank == where:
                local.to_local()[0, 0] = math.inf
        stepped = precision.update(optimizer, lambda: None)
        found.append((stepped, torch.equal(before, layout.whole(parameter.detach()))))
    return found


@pytest.mark.parametrize("where", [0, 1])
def test_an_overflow_in_one_shard_skips_the_update_on_all_ranks(ranks: Ranks, where: int) -> None:
    assert ranks(2, overflow, where) == [[(False, True), (True, False)]] * 2


def without_backward(backend: Backend) -> str:
    model = stack()
    slots = slots_of(backend, 2)
    gradients = sharded_gradients(model, slots, backend)
    assert str(gradients.meeting) == "no gradients yet"
    with pytest.raises(RuntimeError) as caught:
        for x, _ in gradients.microbatches([microbatch("mlp", 0, slots.rank)], 1):
            gradients.module(x)
    assert "of step 1 are on their way" in str(gradients.meeting)
    return str(caught.value)


def test_a_step_without_a_backward_says_so(ranks: Ranks) -> None:
    for message in ranks(2, without_backward):
        assert "expected the gradients of 3 groups of parameters, got 0" in message


def test_groups_are_the_children_of_lists_the_model_last() -> None:
    model = Odd()
    assert groups_of(model) == [*model.blocks, model]
    nested = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ReLU(), nn.ModuleList([nn.Linear(2, 2)]))
    assert groups_of(nested) == [nested[0], nested[2][0], nested]
    nested[0][1].weight = nested[2][0].weight  # tied: where it is needed twice it stays with the model
    assert groups_of(nested) == [nested[0][0], nested]


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def mixed_dtypes() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2).double()})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Scalar, "scale of shape (); give it the shape (1,)"),
        (lambda: nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last), "lie in memory row by row; weight does not"),
        (mixed_dtypes, "ModuleDict has torch.float32 and torch.float64"),
    ],
)
def test_what_cannot_be_cut_is_refused_on_one_rank_too(build: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shard(build(), "fsdp", Slots(1), process_group=None, reduction="invariant", device=CPU)
    assert message in str(caught.value)


ELEMENTWISE = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD", "Rprop"]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_optimizers_that_docs_name_step_a_part_as_a_part_of_the_whole(name: str) -> None:
    """Kernels treat the last elements of a tensor apart: a cut moves that place, and must not show."""
    options = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    generator = torch.Generator().manual_seed(5)
    whole = torch.randn(41, 3, generator=generator)
    gradients = [torch.randn(41, 3, generator=generator) * 10.0 ** (step - 2) for step in range(4)]

    def after_steps(cuts: list[slice]) -> Tensor:
        parts = [nn.Parameter(whole[cut].clone()) for cut in cuts]
        optimizer = getattr(torch.optim, name)(parts, **options)
        for gradient in gradients:
            for part, cut in zip(parts, cuts, strict=True):
                part.grad = gradient[cut].clone()
            optimizer.step()
        return torch.cat([part.detach() for part in parts])

    expected = after_steps([slice(0, 41)])
    assert not torch.equal(expected, whole)
    for rows in (1, 7, 14, 21):
        assert torch.equal(after_steps([slice(i, min(41, i + rows)) for i in range(0, 41, rows)]), expected)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS, "LBFGS looks at whole parameters"),
        (lambda parameters: torch.optim.SGD(parameters, fused=True), "SGD(fused=True) rounds the last elements"),
    ],
)
def test_optimizers_that_would_give_other_bits_are_refused(optimizer: Any, message: str) -> None:
    model = stack()
    layout = shard(model, "fsdp", Slots(1), process_group=None, reduction="invariant", device=CPU)
    with pytest.raises(ConfigError) as caught:
        layout.check_optimizer(optimizer(model.parameters()))
    assert message in str(caught.value)
