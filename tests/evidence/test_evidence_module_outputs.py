"""Records of every module's output: their order and content, that they change no bit, and where two lists differ."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disttrain.errors import ConfigError
from disttrain.evidence import batch_hash
from disttrain.evidence.module_outputs import ModuleOutputs, first_output_difference, largest
from disttrain.parallel.recomputation import recompute


class Twice(nn.Module):
    """Calls a module twice, returns a dict, and changes an output in place after it was returned."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.relu = nn.ReLU(inplace=True)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"once": self.relu(self.norm(self.inner(x))), "twice": self.inner(self.inner(x))}


def step(model: nn.Module, records: list[dict[str, Any]] | None) -> list[Tensor]:
    """Run a forward and a backward; return the gradients."""
    outputs = None if records is None else ModuleOutputs(model, records.append)
    torch.manual_seed(3)
    x = torch.randn(2, 3)
    if outputs is not None:
        outputs.begin(1)
    found = model(x)
    (found["once"].sum() + found["twice"].square().sum()).backward()
    if outputs is not None:
        outputs.end()
        outputs.close()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    model.zero_grad()
    return gradients


def made() -> Twice:
    torch.manual_seed(0)
    return Twice()


def test_the_order_of_the_records() -> None:
    records: list[dict[str, Any]] = []
    model = made()
    step(model, records)
    forward = [(each["module"], each["call"]) for each in records if each["pass"] == "forward"]
    assert forward == [("inner", 1), ("norm", 1), ("relu", 1), ("inner", 2), ("inner", 3), ("", 1)]
    kinds = [each["pass"] for each in records]
    assert kinds == sorted(kinds, key=["forward", "backward", "gradient"].index)
    backward = [(each["module"], each["call"]) for each in records if each["pass"] == "backward"]
    assert set(backward) == set(forward[:-1])
    assert backward.index(("inner", 3)) < backward.index(("inner", 2))
    assert backward.index(("relu", 1)) < backward.index(("norm", 1))
    gradients = [each["module"] for each in records if each["pass"] == "gradient"]
    assert gradients == ["inner.weight", "inner.bias", "norm.weight", "norm.bias"]
    assert {each["slot"] for each in records} == {1}


def test_the_values_are_those_of_the_outputs() -> None:
    records: list[dict[str, Any]] = []
    model = made()
    step(model, records)
    torch.manual_seed(3)
    x = torch.randn(2, 3)
    once = model.inner(x)
    assert records[0]["hash"] == batch_hash(once)
    assert records[0]["max_abs"] == float(once.abs().max())
    assert records[0]["class"] == "Linear"
    normed = model.norm(once)
    assert records[1]["hash"] == batch_hash(normed)  # before ReLU changed it in place


def test_they_change_no_bit_and_leave_nothing() -> None:
    plain, watched = made(), made()
    expected = step(plain, None)
    for _ in range(2):
        for one, other in zip(expected, step(watched, []), strict=True):
            assert torch.equal(one, other)
    assert not any(module._forward_hooks for module in watched.modules())
    assert not any(parameter._backward_hooks for parameter in watched.parameters())


def test_a_module_that_runs_again_in_the_backward_is_recorded_once() -> None:
    records: list[dict[str, Any]] = []
    again: list[dict[str, Any]] = []
    model, recomputing = made(), made()
    recompute(recomputing, ["LayerNorm", "Linear"])
    step(model, records)
    step(recomputing, again)
    assert first_output_difference(records, again) is None


def test_the_largest_value() -> None:
    assert largest({"a": torch.tensor([1.0, -3.0]), "b": [torch.tensor(2, dtype=torch.int64)]}) == 3.0
    assert largest(torch.tensor([math.nan, 1.0])) == "nan"
    assert largest((torch.tensor([-math.inf]), torch.tensor([math.nan]))) == "nan"
    assert largest(torch.tensor([-math.inf])) == "inf"
    assert largest([torch.ones(0), torch.tensor(True), None, "text"]) is None


def test_the_first_difference() -> None:
    left: list[dict[str, Any]] = []
    right: list[dict[str, Any]] = []
    step(made(), left)
    changed = made()
    changed.norm.eps = 1e-3
    step(changed, right)
    assert first_output_difference(left, left) is None
    difference = first_output_difference(left, right)
    assert difference is not None
    assert (difference.num_same, difference.is_other_call) == (1, False)
    text = str(difference)
    assert text.startswith("the output of norm (LayerNorm), call 1 in slot 1: ")
    assert left[1]["hash"] in text
    assert right[1]["hash"] in text


def test_other_calls_and_a_gradient_that_differs() -> None:
    left: list[dict[str, Any]] = []
    step(made(), left)
    shorter = first_output_difference(left, left[:-1])
    assert shorter is not None
    assert shorter.is_other_call
    assert str(shorter) == "other modules run: the parameter norm.bias, slot 1, and nothing more on the other side"
    place = next(number for number, each in enumerate(left) if each["pass"] == "backward")
    right = [*left[:place], {**left[place], "hash": "0", "max_abs": None}, *left[place + 1 :]]
    assert str(first_output_difference(left, right)).startswith("the gradient of the output of ")
    right = [*left[:-1], {**left[-1], "hash": "0", "max_abs": "nan"}]
    text = str(first_output_difference(left, right))
    assert text.startswith("the gradient of the parameter norm.bias, slot 1: ")
    assert text.endswith("on the other side 0, largest value 'nan'")


def test_an_output_without_plain_memory_is_recorded_without_a_hash() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            nested = torch.nested.nested_tensor([x[0], x[1, :2]])
            return {"once": x.clone().requires_grad_(), "twice": x.clone().requires_grad_(), "nested": nested}

    records: list[dict[str, Any]] = []
    step(Nested(), records)
    assert [each["hash"] for each in records] == [None]


def test_a_compiled_model_is_refused() -> None:
    model = made()
    model.compile()
    with pytest.raises(ConfigError, match="compiled"):
        ModuleOutputs(model, lambda record: None)


def test_a_module_that_returns_a_parameter() -> None:
    """Its hook would stay on the parameter."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self) -> Tensor:
            return self.weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Table()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"once": x * self.table(), "twice": self.table() * x}

    records: list[dict[str, Any]] = []
    model = Model()
    step(model, records)
    step(model, records)
    assert [each["pass"] for each in records] == ["forward", "forward", "forward", "gradient"] * 2
