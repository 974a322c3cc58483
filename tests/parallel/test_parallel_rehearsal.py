"""A forward that depends on more than weights, buffers, batch and seed is refused in a process's first step."""

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks
from slot_models import NEEDS_FSDP, refusals, slots_of
from torch import Tensor, nn

from disttrain.backend.base import Backend
from disttrain.engine import create_supervised_trainer
from disttrain.errors import ConfigError
from disttrain.parallel import SlotGradients, Slots, World, strategy_for
from disttrain.parallel.leaving_out import LeavingOut
from disttrain.parallel.rehearsal import deep_copy

NUM_SLOTS = 3
CPU = torch.device("cpu")


class Net(nn.Module):
    """A model with dropout and BatchNorm, whose hidden units `changed` changes."""

    def __init__(self, changed: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 1)
        self.norm, self.dropout = nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.teacher = nn.Linear(4, 6).requires_grad_(False)
        self.register_buffer("mask", torch.ones(6), persistent=False)
        self.value = 1.0
        self.own = torch.Generator().manual_seed(3)
        self.scale = torch.ones(())
        self.last_output: Any = None
        self.changed = changed

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.changed(self, self.dropout(self.norm(self.first(x)))))


def number(net: Net, hidden: Tensor) -> Tensor:
    net.value = net.value * 0.9 + 0.2
    return hidden * net.value


def tensor(net: Net, hidden: Tensor) -> Tensor:
    net.scale.add_(1)
    return hidden * net.scale


def counter() -> Callable[[Net, Tensor], Tensor]:
    calls = 0

    def changed(net: Net, hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return hidden / calls

    return changed


def by_python(net: Net, hidden: Tensor) -> Tensor:
    return hidden * random.random()


def by_numpy(net: Net, hidden: Tensor) -> Tensor:
    return hidden + float(np.random.randn())


def by_its_own(net: Net, hidden: Tensor) -> Tensor:
    return hidden * torch.rand(6, generator=net.own)


def counted_and_kept(net: Net, hidden: Tensor) -> Tensor:
    net.value += 1
    net.last_output = hidden
    return hidden


def momentum_teacher(net: Net, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        net.teacher.weight.lerp_(net.first.weight, 0.1)
        net.teacher.bias.data = net.teacher.bias.data + 0.1
        net.mask.mul_(0.5)
    return hidden * net.teacher.weight.mean() * net.teacher.bias.sum() * net.mask


def seeded_anew(net: Net, hidden: Tensor) -> Tensor:
    return hidden * torch.rand(6, generator=torch.Generator().manual_seed(torch.initial_seed()))


KINDS: dict[str, Callable[[], Callable[[Net, Tensor], Tensor]]] = {
    "number": lambda: number,
    "tensor": lambda: tensor,
    "counter": counter,
    "python": lambda: by_python,
    "numpy": lambda: by_numpy,
    "own": lambda: by_its_own,
    "kept": lambda: counted_and_kept,
    "teacher": lambda: momentum_teacher,
    "seeded": lambda: seeded_anew,
}
REFUSED = {
    "number": "it changes the attribute value of Net, which no checkpoint holds",
    "tensor": "it changes the attribute scale of Net, which no checkpoint holds",
    "counter": "the forward depends on something else than weights, buffers, batch and seed: a resume",
    "python": "it draws from Python's random",
    "numpy": "it draws from numpy.random",
    "own": "the forward depends on something else than weights, buffers, batch and seed: a resume",
}


def data(step: int, slot: int) -> Tensor:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(100 * step + slot))
    return x.requires_grad_()


def trained(backend: Backend, kind: str, strategy: Any, rehearses: bool, gather: Any = "step") -> tuple[str, int]:
    """Train some steps with the step body of a run; return the hash of the weights, and the number of outputs."""
    torch.manual_seed(0)
    model = Net(KINDS[kind]())
    slots = slots_of(backend, NUM_SLOTS)
    world = World(
        slots=slots,
        device=CPU,
        process_group=backend.process_group,
        fsdp_gather=gather,
        rehearses=rehearses,
    )
    chosen = strategy_for(strategy, model, world)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.1)

    def loss_of(y_pred: Tensor, x: Tensor) -> Tensor:
        loss = y_pred.square().mean()
        with torch.no_grad():
            x.zero_()  # a change of the input, which the second pass must not see
        return loss

    trainer = create_supervised_trainer(
        model,
        optimizer,
        loss_of,
        prepare_batch=lambda x, device, non_blocking: (x.exp(), x),
        output_transform=lambda x, y, y_pred, loss: loss.detach(),
        gradients=LeavingOut(chosen.gradients(model, seed=1), lambda step: step == 1),
    )
    num_outputs = 0
    for step in range(1, 5):
        trainer.state.iteration = step
        batch = [data(step, slot) for slot in slots.mine]
        num_outputs += len(trainer._process_function(trainer, batch))
    state = hashlib.sha256()
    for tensor in model.state_dict().values():
        state.update(chosen.layout.whole(tensor).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest(), num_outputs


def refusal(backend: Backend, kind: str, strategy: Any, gather: Any) -> str:
    with refusals(backend) as told:
        trained(backend, kind, strategy, True, gather)
    return "".join(told)


WORLDS = [
    (1, "ddp", "step"),
    (2, "ddp", "step"),
    (3, "ddp", "step"),
    *(pytest.param(size, "fsdp", "step", marks=NEEDS_FSDP) for size in (2, 3)),
    pytest.param(3, "fsdp", "module", marks=NEEDS_FSDP),
]


@pytest.mark.parametrize(
    ("world_size", "strategy", "gather", "kind"),
    [
        *((1, "ddp", "step", kind) for kind in REFUSED),
        *((2, "ddp", "step", kind) for kind in ("number", "numpy")),
        (3, "ddp", "step", "counter"),
        *(pytest.param(2, "fsdp", "step", kind, marks=NEEDS_FSDP) for kind in ("number", "python")),
        pytest.param(3, "fsdp", "step", "own", marks=NEEDS_FSDP),
        *(pytest.param(3, "fsdp", "module", kind, marks=NEEDS_FSDP) for kind in ("number", "own")),
    ],
)
def test_what_is_no_function_of_weights_buffers_batch_and_seed_is_refused(
    ranks: Ranks, kind: str, world_size: int, strategy: str, gather: str
) -> None:
    for message in ranks(world_size, refusal, kind, strategy, gather):
        assert message.startswith("the gradient of ")
        assert REFUSED[kind] in message


ALLOWED = [kind for kind in KINDS if kind not in REFUSED]


def each_allowed(backend: Backend, strategy: Any, gather: Any, rehearses: bool) -> dict[str, tuple[str, int]]:
    kinds = ALLOWED if gather == "step" else [kind for kind in ALLOWED if kind != "teacher"]  # no parameter moves there
    return {kind: trained(backend, kind, strategy, rehearses, gather) for kind in kinds}


@pytest.mark.parametrize(("world_size", "strategy", "gather"), WORLDS)
def test_a_rehearsal_changes_no_bit_and_adds_no_output(
    ranks: Ranks, world_size: int, strategy: str, gather: str
) -> None:
    [expected] = ranks(1, each_allowed, "ddp", "step", False)
    by_rank = ranks(world_size, each_allowed, strategy, gather, True)
    for kind in by_rank[0]:
        assert {results[kind][0] for results in by_rank} == {expected[kind][0]}
        assert sum(results[kind][1] for results in by_rank) == expected[kind][1] == 3 * NUM_SLOTS


def rehearsing(model: nn.Module, batch: list[Any], gradients: SlotGradients, iteration: int = 1) -> list[bool]:
    seen = []
    for x in gradients.microbatches(batch, iteration):
        seen.append(gradients.rehearsing)
        (x if isinstance(x, Tensor) else next(x)).mean().mul(model(torch.ones(1, 2)).sum()).backward()
    return seen


def test_the_first_step_of_a_process_is_rehearsed_if_that_is_wanted_and_the_batch_can_be_copied() -> None:
    model, two = nn.Linear(2, 1), [torch.ones(1), torch.ones(1)]
    gradients = SlotGradients(model, Slots(2), seed=1, rehearses=True)
    assert rehearsing(model, two, gradients) == [True, False, False]
    assert rehearsing(model, two, gradients, 2) == [False, False]
    assert rehearsing(model, two, SlotGradients(model, Slots(2), seed=1)) == [False, False]

    def once() -> Iterator[Tensor]:
        yield torch.ones(1)

    assert rehearsing(model, [once(), once()], SlotGradients(model, Slots(2), seed=1, rehearses=True)) == [False] * 2


def test_a_first_step_that_failed_is_rehearsed_again_and_refused_again() -> None:
    model = Net(number)
    gradients = SlotGradients(model, Slots(1), seed=1, rehearses=True)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^the gradient of first\.weight and .* more changes"):
            for x in gradients.microbatches([torch.ones(4, 4)], 1):
                model(x).mean().backward()


def test_the_generators_go_on_as_without_a_rehearsal() -> None:
    states = []
    for rehearses in (True, False):
        random.seed(1)
        np.random.seed(1)
        model = Net(counted_and_kept)
        gradients = SlotGradients(model, Slots(1), seed=1, rehearses=rehearses)
        for x in gradients.microbatches([torch.ones(4, 4)], 1):
            random.random()
            np.random.rand()
            model(x).mean().backward()
        states.append((random.random(), float(np.random.rand()), torch.rand(()).item()))
    assert states[0] == states[1]


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_copy_of_a_batch_lies_as_its_tensors_do(offset: int) -> None:
    tensor = torch.arange(20.0)[offset : offset + 12].view(3, 4)
    other = torch.arange(6).view(2, 3).t()
    copied = deep_copy({"x": [tensor, tensor], "y": other, "z": 3})
    assert torch.equal(copied["x"][0], tensor)
    assert copied["x"][0] is copied["x"][1]
    assert copied["x"][0].data_ptr() % 64 == tensor.data_ptr() % 64
    assert copied["x"][0].data_ptr() != tensor.data_ptr()
    assert torch.equal(copied["y"], other)
    assert copied["y"].stride() == other.stride()
    copied["x"][0].zero_()
    assert tensor.sum() > 0
