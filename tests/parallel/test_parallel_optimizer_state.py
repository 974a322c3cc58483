"""An optimizer's state is loaded with its own dtypes and bits, for any dtype of the parameters."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disttrain.parallel.optimizer_state import load_optimizer


class Masters(torch.optim.Optimizer):
    """Keeps float32 masters, 8-bit moments and an int64 count of low-precision weights."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["master"] = parameter.float()
                    state["moment"] = torch.zeros(parameter.shape, dtype=torch.uint8)
                    state["count"] = torch.zeros((), dtype=torch.int64)
                    state["note"] = "begun"
                state["count"] += 1
                state["moment"] += 37
                state["master"] -= group["lr"] * parameter.grad.float() / 3
                parameter.copy_(state["master"])


def trained(optimizer_class: Any, dtype: torch.dtype, num_steps: int = 3) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(5, 3).to(dtype)
    optimizer = optimizer_class(model.parameters())
    for _ in range(num_steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: Any) -> None:
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.linspace(-1, 1, parameter.numel()).view_as(parameter).to(parameter.dtype) * (i + 1)
    optimizer.step()


def bits(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.dtype, state.flatten().view(torch.uint8).tolist() if state.ndim else state.item()
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    return [bits(value) for value in state] if isinstance(state, list | tuple) else state


@pytest.mark.parametrize(
    ("optimizer_class", "dtype"),
    [
        (Masters, torch.bfloat16),
        (Masters, torch.float64),
        (torch.optim.NAdam, torch.float64),
        (torch.optim.NAdam, torch.bfloat16),
        (torch.optim.ASGD, torch.float64),
        (torch.optim.Adam, torch.float64),
    ],
)
def test_what_goes_on_from_a_loaded_state_has_the_bits_of_what_went_on(
    optimizer_class: Any, dtype: torch.dtype
) -> None:
    model, optimizer = trained(optimizer_class, dtype)
    saved = copy.deepcopy(optimizer.state_dict())
    again, loaded = trained(optimizer_class, dtype, num_steps=0)
    again.load_state_dict(model.state_dict())
    load_optimizer(loaded, saved)
    assert bits(loaded.state_dict()["state"]) == bits(saved["state"])
    for each, its_optimizer in ((model, optimizer), (again, loaded)):
        step(each, its_optimizer)
    assert bits(again.state_dict()) == bits(model.state_dict())


def test_torchs_own_loading_casts() -> None:
    """Were this to pass no more, the module could go."""
    _, optimizer = trained(Masters, torch.bfloat16)
    _, loaded = trained(Masters, torch.bfloat16, num_steps=0)
    loaded.load_state_dict(optimizer.state_dict())
    assert next(iter(loaded.state.values()))["master"].dtype == torch.bfloat16


def test_the_loaded_state_is_a_copy() -> None:
    _, optimizer = trained(Masters, torch.bfloat16)
    saved = copy.deepcopy(optimizer.state_dict())
    before = bits(saved)
    model, loaded = trained(Masters, torch.bfloat16, num_steps=0)
    load_optimizer(loaded, saved)
    step(model, loaded)
    assert bits(saved) == before
