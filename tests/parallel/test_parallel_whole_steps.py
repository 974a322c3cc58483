"""An optimizer that looks across a parameter has the bits of one rank, over parameters that are cut over the ranks."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from ranks import Ranks
from slot_models import microbatch, slots_of
from test_parallel_fsdp import bits, strategy_of
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy

from disttrain.backend.base import Backend
from disttrain.errors import DisttrainError

NUM_STEPS = 4


class Own(optim.Optimizer):
    """Has every kind of state: of the parameter's shape, of its rows, a list of matrices, a count, a number."""

    def __init__(self, parameters: Iterable[Any], lr: float = 0.1, counts: str = "calls") -> None:
        super().__init__(parameters, {"lr": lr, "calls": 0})
        self._counts = counts

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if self._counts == "calls" or group["params"]:
                group["calls"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, rows = self.state[parameter], parameter.grad.flatten(1) if parameter.ndim > 1 else gradient[None]
        if not state:
            state.update(average=torch.zeros_like(parameter), rows=rows.new_zeros(len(rows)), matrices=[], count=0)
            state["step"] = torch.tensor(0.0)
        if state["count"] == 1:  # a state that comes later, and a list that grows
            state["late"] = torch.zeros_like(parameter, dtype=torch.float64)
        state["count"] += 1
        state["step"] += 1
        state["matrices"] = [*state["matrices"][-1:], rows @ rows.T]
        state["rows"].lerp_(rows.square().mean(1), 0.5)
        state["average"].lerp_(gradient - gradient.mean(), 0.25)
        shape = (-1, *[1] * (parameter.ndim - 1)) if parameter.ndim > 1 else (1,)
        parameter.sub_(group["lr"] * state["average"] / (state["rows"].view(shape).sqrt() + 1e-3))


class Net(nn.Module):
    """Matrices with sizes that no number of ranks divides, one with fewer rows than ranks, and one that is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in ((12, 31), (31, 2), (2, 17)))
        self.head = nn.Linear(17, 10, bias=False)
        self.never = nn.Linear(3, 3, bias=False)
        self.frozen = nn.Linear(10, 10).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.frozen(self.head(x))


def two_groups(make: Any, parameters: list[nn.Parameter]) -> optim.Optimizer:
    optimizer: optim.Optimizer = make([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.03}])
    return optimizer


OPTIMIZERS: dict[str, Any] = {
    "muon": partial(optim.Muon, lr=0.05),
    "adafactor": partial(optim.Adafactor, lr=0.05),
    "rprop": optim.Rprop,
    "fused": partial(optim.AdamW, lr=0.01, fused=True),
    "own": Own,
    "groups": partial(two_groups, Own),
}


def trained(backend: Backend, names: tuple[str, ...], strategy: str) -> dict[str, str]:
    results: dict[str, str] = {}
    for name in names:
        torch.manual_seed(7)
        slots, model = slots_of(backend, 4), Net()
        chosen = strategy_of(model, slots, backend, strategy)
        optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
        chosen.layout.step_whole(optimizer)
        schedule = optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        gradients = chosen.gradients(model, seed=3)
        for step in range(NUM_STEPS):
            optimizer.zero_grad()
            batch = [microbatch("mixed", step, slot) for slot in slots.mine]
            for x, y in gradients.microbatches(batch, step + 1):
                cross_entropy(gradients.module(x), y).backward()
            optimizer.step()
            schedule.step()
        whole = chosen.layout.whole
        results |= {f"{name} {key}": bits(whole(tensor)) for key, tensor in model.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in sorted(state.items()):
                parts = value if isinstance(value, list) else [value]
                for number, part in enumerate(parts):
                    text = bits(whole(part)) if isinstance(part, Tensor) else str(part)
                    results[f"{name} {index} {key} {number}"] = text
        results[f"{name} groups"] = str(optimizer.state_dict()["param_groups"])
        gradients.close()
    return results


@pytest.mark.parametrize("strategy", ["fsdp", "by module"])
def test_every_bit_of_weights_and_states_is_that_of_one_rank(ranks: Ranks, strategy: str) -> None:
    names = tuple(OPTIMIZERS)
    alone = ranks(1, trained, names, "ddp")[0]
    assert sum("own" in key for key in alone) > 30
    for world_size in (2, 3):
        for results in ranks(world_size, trained, names, strategy):
            assert results == alone


def states_between_steps(backend: Backend) -> list[list[tuple[str, bool]]]:
    slots, model = slots_of(backend, 4), Net()
    chosen = strategy_of(model, slots, backend)
    optimizer = Own([p for p in model.parameters() if p.requires_grad])
    chosen.layout.step_whole(optimizer)
    gradients = chosen.gradients(model, seed=3)
    kept: list[Any] = []
    for step in range(3):
        batch = [microbatch("mixed", step, slot) for slot in slots.mine]
        for x, y in gradients.microbatches(batch, step + 1):
            cross_entropy(gradients.module(x), y).backward()
        optimizer.step()
        kept.append(optimizer.state[model.layers[0].weight]["average"])
    gradients.close()
    assert kept[0] is kept[1], "a state must stay the same tensor"
    return [
        [(key, hasattr(value, "to_local")) for key, value in sorted(state.items()) if isinstance(value, Tensor)]
        for state in optimizer.state.values()
    ]


def test_between_steps_the_states_of_a_parameters_shape_are_cut_and_no_others(ranks: Ranks) -> None:
    for states in ranks(2, states_between_steps):
        assert len(states) == 5  # an unused parameter has a gradient of zeros
        for state in states:
            assert state == [("average", True), ("late", True), ("rows", False), ("step", False)]


def other_values(backend: Backend) -> str:
    """Step an optimizer whose group counts only where the group has parameters: rank 1 owns none."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    slots = slots_of(backend, 4)
    chosen = strategy_of(model, slots, backend)
    optimizer = Own(model.parameters(), counts="groups with parameters")
    chosen.layout.step_whole(optimizer)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    try:
        optimizer.step()
    except DisttrainError as error:
        return str(error)
    return "no error"


def test_values_of_groups_that_would_part_are_an_error_on_every_rank(ranks: Ranks) -> None:
    for message in ranks(2, other_values):
        assert message.startswith("Own has other values in its groups on some ranks")
