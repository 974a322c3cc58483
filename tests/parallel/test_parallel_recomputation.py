"""Chosen modules run again in the backward, and nothing of a step changes but the memory that it takes."""

import copy
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from disttrain.errors import ConfigError
from disttrain.parallel.recomputation import recompute


class Block(nn.Module):
    """Dropout, statistics, a weight that moves a buffer at each use, and options whose names torch uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = spectral_norm(nn.Linear(8, 8))
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.out = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)
        self.num_runs = 0

    def forward(self, x: Tensor, *, scale: float = 1.0, debug: bool = False) -> Tensor:
        self.num_runs += 1
        self.calls += 1
        hidden = self.drop(self.norm(self.narrow(x)).relu()) * int(self.calls)
        return x + self.out(hidden) * scale * (2 if debug else 1)


class Wide(Block):
    pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), Wide()])
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, middle, last = self.blocks
        return self.head(last(first(middle(first(x, debug=True))), scale=0.5))


def steps(choice: Any, dtype: torch.dtype | None = None, copied: bool = False) -> tuple[list[Tensor], int, Net]:
    """Train a net; return its state, the next random number, the bytes that its forwards keep, and the net."""
    torch.manual_seed(0)
    net = Net()
    recompute(net, choice)
    if copied:
        net = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(4, 8)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype is not None),
        ):
            loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*net.state_dict().values(), torch.rand(3)], kept, net


@cache
def steps_whole(dtype: torch.dtype | None = None) -> tuple[list[Tensor], int, Net]:
    return steps((), dtype)


@pytest.mark.parametrize(
    ("choice", "dtype"),
    [
        (["Block"], None),
        ([Block], torch.bfloat16),
        (["Linear"], None),
        (["Wide", nn.Sequential], torch.bfloat16),
        (["Net", "Block"], None),
        (True, None),
    ],
)
def test_the_bits_are_those_of_a_model_that_keeps_everything(choice: Any, dtype: torch.dtype | None) -> None:
    whole, kept_whole, _ = steps_whole(dtype)
    again, kept, _ = steps(choice, dtype)
    assert all(torch.equal(*pair) for pair in zip(whole, again, strict=True))
    assert kept < kept_whole or choice == ["Linear"]


def test_a_module_keeps_its_inputs_alone_and_runs_again() -> None:
    _, whole, net = steps_whole()
    _, kept, recomputed = steps(["Block"])
    assert kept < whole / 2
    assert [net.blocks[i].num_runs for i in (0, 2)] == [6, 3]
    assert [recomputed.blocks[i].num_runs for i in (0, 2)] == [12, 6]
    with torch.no_grad():
        recomputed(torch.ones(2, 8))
    assert recomputed.blocks[2].num_runs == 7


def test_names_types_and_signatures_stay() -> None:
    net, changed = Net(), Net()
    assert recompute(changed, ["Block"]) == ["blocks.0", "blocks.2"]
    assert list(net.state_dict()) == list(changed.state_dict())
    for kind in ("named_parameters", "named_buffers", "named_modules"):
        assert [name for name, _ in getattr(net, kind)()] == [name for name, _ in getattr(changed, kind)()]
    assert type(changed.blocks[2]) is Wide
    assert inspect.signature(changed.blocks[0].forward) == inspect.signature(net.blocks[0].forward)


def test_a_copy_runs_its_own_modules() -> None:
    whole, _, _ = steps_whole()
    again, _, net = steps(True, copied=True)
    assert all(torch.equal(*pair) for pair in zip(whole, again, strict=True))
    assert net.blocks[0].num_runs == 12


def second_order(net: Net, x: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return slope.square().mean()


def other_weights(net: Net, x: Tensor) -> Tensor:
    weights = {name: weight * 1.5 for name, weight in net.named_parameters()}
    return torch.func.functional_call(net, weights, (x,)).square().mean()


def twice(net: Net, x: Tensor) -> Tensor:
    loss = net(x).square().mean()
    loss.backward(retain_graph=True)
    return loss


@pytest.mark.parametrize("program", [second_order, other_weights, twice])
def test_gradients_of_programs_are_the_same(program: Callable[[Net, Tensor], Tensor]) -> None:
    gradients = []
    for choice in ((), ["Block"]):
        torch.manual_seed(1)
        net = Net()
        recompute(net, choice)
        program(net, torch.randn(4, 8, requires_grad=True)).backward()
        found = [weight.grad for weight in net.parameters() if weight.grad is not None]
        gradients.append([*found, *net.buffers()])
        assert len(found) >= 14  # all but the last biases, on which no second derivative depends
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


class Teacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8), requires_grad=False)
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.lerp_(torch.zeros(8), 0.1)
        return self.layer(x * self.weight)


def test_a_frozen_parameter_that_would_move_twice_is_refused() -> None:
    net = nn.Sequential(Teacher())
    recompute(net, ["Teacher"])
    with pytest.raises(ConfigError, match="the forward of Teacher changes its frozen parameter weight, which would"):
        net(torch.ones(2, 8))


@pytest.mark.parametrize(
    ("make", "choice", "message"),
    [
        (Net, ["Blocks"], "no module of the model is a Blocks; expected one of its classes: Net, Block, Wide, ModuleL"),
        (Net, [nn.Conv2d], "no module of the model is a Conv2d; expected one of"),
        (Net, ["Module"], "no module of the model is a Module; expected one of"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), True, "=True: the model has no nn.ModuleList or nn.Sequential of"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), ["RecursiveScriptModule"], "the model is compiled by torch.jit"),
    ],
)
def test_a_choice_that_fits_nothing_names_what_there_is(make: Any, choice: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recompute(make(), choice)
    assert str(caught.value).startswith("activation_checkpointing")
    assert message in str(caught.value)
