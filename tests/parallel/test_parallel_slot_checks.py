"""A forward that changes parameters, and an unfinished loop, are refused on one rank as on several."""

import gc
import itertools
from typing import Any

import pytest
import torch
from ranks import Ranks
from slot_models import NEEDS_FSDP, refusals, slots_of
from torch import Tensor, nn

from disttrain.backend.base import Backend
from disttrain.errors import ConfigError
from disttrain.parallel import SlotGradients, Slots, World, strategy_for
from disttrain.parallel.slot_checks import CHECKED_STEPS


class Teacher(nn.Module):
    """A frozen copy that the forward moves towards the student."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(2, 1)
        self.teacher = nn.Linear(2, 1).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.teacher.weight.lerp_(self.student.weight, 0.1)
        return self.student(x) - self.teacher(x)


class Replaced(nn.Linear):
    """A trained parameter whose values the forward replaces; no version counter sees it."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = self.weight.data * 0.9
        return super().forward(x)


class Clipped(nn.Linear):
    """A trained parameter that the forward clips."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-1, 1)
        return super().forward(x)


class Growing(nn.Module):
    """A buffer that grows with each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x.detach().mean().view(1)])
        return self.layer(x)


class Moved(nn.Module):
    """Buffers of one shape, moved in place and replaced: both are allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean.lerp(x.detach().mean(0), 0.1)
        self.count += 1
        return self.layer(x - self.mean)


MODELS: dict[str, Any] = {
    "teacher": Teacher,
    "clipped": lambda: Clipped(2, 1),
    "replaced": lambda: Replaced(2, 1),
    "growing": Growing,
    "moved": Moved,
}


def steps(backend: Backend, name: str, num_slots: int, strategy: Any) -> str:
    """Run some steps; return the message of the error, or an empty string."""
    torch.manual_seed(0)
    model = MODELS[name]()
    slots = slots_of(backend, num_slots)
    world = World(slots=slots, device=torch.device("cpu"), process_group=backend.process_group)
    gradients = strategy_for(strategy, model, world).gradients(model, seed=1)
    with refusals(backend) as told:
        for iteration in range(1, 4):
            batch = [torch.full((4, 2), float(slot)) for slot in slots.mine]
            for x in gradients.microbatches(batch, iteration):
                gradients.module(x).mean().backward()
    return "".join(told)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("teacher", ""),  # it moves as buffers do: see test_parallel_buffers.py
        ("clipped", "the model's forward changes its parameter weight"),
        ("replaced", "the model's forward changes its parameter weight"),
        ("growing", "the forward of Growing changes its buffer seen from torch.float32 [0] to torch.float32 [1]"),
        ("moved", ""),
    ],
)
@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [(1, "ddp"), (2, "ddp"), (1, "fsdp"), *(pytest.param(size, "fsdp", marks=NEEDS_FSDP) for size in (2, 3))],
)
def test_what_a_forward_may_not_change_is_named_on_any_number_of_ranks(
    ranks: Ranks, name: str, told: str, world_size: int, strategy: str
) -> None:
    for message in ranks(world_size, steps, name, 3, strategy):
        assert message.startswith(told)
        assert bool(message) == bool(told)


def gradients_of(model: nn.Module, num_slots: int = 3) -> SlotGradients:
    return SlotGradients(model, Slots(num_slots), seed=1)


BATCH = [torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2)]


LEAVINGS = ("zip", "break at the last", "break", "step inside")


def left(gradients: Any, optimizer: torch.optim.Optimizer, iteration: int, how: str) -> None:
    """Run one step whose loop is left as `how` says, up to the optimizer's step."""
    mine = gradients.slots.mine
    microbatches = gradients.microbatches([torch.full((2, 2), float(slot + 1)) for slot in mine], iteration)
    pairs = zip(mine, microbatches, strict=False) if how == "zip" else zip(microbatches, mine, strict=False)
    for number, pair in enumerate(pairs, start=1):
        x = pair[1] if how == "zip" else pair[0]
        gradients.module(x).sum().backward()
        if how == "step inside":
            optimizer.step()
        if how == "break" or (how == "break at the last" and number == len(mine)):
            break
    optimizer.step()


def leave_twice(backend: Backend, strategy: Any) -> list[tuple[str, bool]]:
    return [leave(backend, how, strategy) for how in ("zip", "break at the last")]


def leave(backend: Backend, how: str, strategy: Any) -> tuple[str, bool]:
    """Leave a loop; return the message of the optimizer's step, and whether the weights stayed the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    slots = slots_of(backend, 4 if backend.world_size < 3 else 3)
    world = World(slots=slots, device=torch.device("cpu"), process_group=backend.process_group)
    gradients = strategy_for(strategy, model, world).gradients(model, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [parameter.detach().clone() for parameter in optimizer.param_groups[0]["params"]]
    try:
        left(gradients, optimizer, 1, how)
    except RuntimeError as error:
        same = [bool((a == b).all()) for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True)]
        return str(error), all(same)
    return "", False


@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [(1, "ddp"), (2, "ddp"), (1, "fsdp"), *(pytest.param(size, "fsdp", marks=NEEDS_FSDP) for size in (2, 3))],
)
def test_a_loop_that_is_left_raises_at_the_optimizers_step(ranks: Ranks, world_size: int, strategy: str) -> None:
    for message, same in itertools.chain(*ranks(world_size, leave_twice, strategy)):
        assert "the loop over the microbatches of step 1 to run to its end, but it was left before" in message
        assert same


@pytest.mark.parametrize("how", LEAVINGS)
def test_a_loop_that_is_left_on_one_rank(how: str) -> None:
    model = nn.Linear(2, 1)
    gradients, optimizer = gradients_of(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="steps after the loop, not inside it"):
        left(gradients, optimizer, 1, how)


def stray(gradients: Any, how: str) -> None:
    """Run the loop of step 1 to its end, and a backward after it."""
    batch = [torch.full((2, 2), float(slot + 1)) for slot in gradients.slots.mine]
    microbatches, module = gradients.microbatches(batch, 1), gradients.module
    if how == "list":
        for x in list(microbatches):
            module(x).sum().backward()
    elif how == "sum":
        sum(module(x).sum() for x in microbatches).backward()  # type: ignore[union-attr]
    else:
        losses = [module(x).sum() for x in microbatches]
        losses[0].backward()


def stray_each(backend: Backend) -> list[str]:
    """Return the message of the optimizer's step after each kind of a backward outside the loop."""
    messages = []
    for how in ("list", "sum", "first"):
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        world = World(slots=slots_of(backend, 4), device=torch.device("cpu"), process_group=backend.process_group)
        gradients = strategy_for("ddp", model, world).gradients(model, seed=1)
        try:
            stray(gradients, how)
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            messages.append("")
        except RuntimeError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_backward_outside_the_loop_raises_at_the_optimizers_step(ranks: Ranks, world_size: int) -> None:
    after_the_loop = "expected one backward for each microbatch, inside the loop"
    for messages in ranks(world_size, stray_each):
        assert [after_the_loop in message for message in messages] == [True] * 3


def test_a_backward_between_the_optimizers_step_and_the_next_loop_is_no_matter() -> None:
    model = nn.Linear(2, 1)
    gradients, optimizer = gradients_of(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for iteration in (1, 2):
        model(torch.ones(1, 2)).sum().backward()  # such as a handler that measures something
        for x in gradients.microbatches(BATCH, iteration):
            gradients.module(x).sum().backward()
        assert model.bias.grad is not None
        assert model.bias.grad.item() == 1.0
        optimizer.step()


def test_a_parameter_that_is_replaced_later_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    gradients = gradients_of(model)
    model[1] = nn.Linear(2, 1)
    with pytest.raises(ConfigError, match=r"the parameter 1\.weight was put into the model after its gradients"):
        list(gradients.microbatches(BATCH, 1))


def test_a_step_that_comes_again_gives_a_warning() -> None:
    """As if it were counted inside the epoch: its slots would draw the same dropout in each epoch."""
    gradients = gradients_of(nn.Linear(2, 1))
    for iteration in (1, 2):
        list(gradients.microbatches(BATCH, iteration))
    with pytest.warns(UserWarning, match="step 2 comes again after step 2.*count the steps over the whole run"):
        list(gradients.microbatches(BATCH, 2))


def test_steps_are_counted_from_1() -> None:
    with pytest.raises(ValueError, match="the number of the step over the whole run, from 1, got 0"):
        list(gradients_of(nn.Linear(2, 1)).microbatches(BATCH, 0))


def test_an_optimizer_of_another_model_may_step_inside_the_loop() -> None:
    other, model = nn.Linear(2, 1), nn.Linear(2, 1)
    gradients, optimizer = gradients_of(model), torch.optim.SGD(other.parameters(), lr=0.1)
    for x in gradients.microbatches(BATCH, 1):
        gradients.module(x).sum().backward()
        other(x).sum().backward()
        before = other.weight.clone()
        optimizer.step()
        assert not torch.equal(other.weight, before)
    before = model.weight.clone()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.weight, before)


def test_what_watches_optimizers_ends_with_its_gradients() -> None:
    model = nn.Linear(2, 1)
    gradients, optimizer = gradients_of(model), torch.optim.SGD(model.parameters(), lr=0.1)
    next(iter(gradients.microbatches(BATCH, 1)))
    model(BATCH[0]).sum().backward()
    with pytest.raises(RuntimeError, match="to run to its end"):
        optimizer.step()
    del gradients
    gc.collect()
    before = model.weight.clone()
    optimizer.step()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("how", ["break", "zip"])
def test_a_loop_that_is_left_raises_at_the_next_step(how: str) -> None:
    """As in a loop that steps without an optimizer of torch."""
    model = nn.Linear(2, 1)
    gradients = gradients_of(model)
    microbatches = gradients.microbatches(BATCH, 1)
    for i, x in enumerate(microbatches) if how == "break" else zip(range(3), microbatches, strict=False):
        gradients.module(x).sum().backward()  # type: ignore[arg-type]
        if how == "break" and i == 2:
            break
    with pytest.raises(RuntimeError, match="microbatches of step 1 to run to its end, but it was left before"):
        list(gradients.microbatches(BATCH, 2))


def test_a_loop_that_ends_may_stand_in_a_zip() -> None:
    model = nn.Linear(2, 1)
    gradients = gradients_of(model)
    for iteration in (1, 2):
        for x, _ in zip(gradients.microbatches(BATCH, iteration), itertools.count(), strict=False):
            gradients.module(x).sum().backward()
        assert model.weight.grad is not None
        assert torch.equal(model.weight.grad, torch.stack([x.sum(0, keepdim=True) for x in BATCH]).mean(0))


def test_a_change_after_the_first_steps_is_not_checked() -> None:
    """Parameters are checked in the first steps only, because a check costs time."""
    model = nn.Linear(2, 1)
    gradients = gradients_of(model)
    for iteration in range(1, CHECKED_STEPS + 3):
        for x in gradients.microbatches(BATCH, iteration):
            gradients.module(x).sum().backward()
            if iteration > CHECKED_STEPS:
                with torch.no_grad():
                    model.weight.add_(0.0)
