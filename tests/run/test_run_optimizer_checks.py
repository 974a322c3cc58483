"""Optimizers that a run cannot step, save or shard are refused before the first step, without being stepped."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, SparseAdam

from disttrain.errors import ConfigError
from disttrain.run.optimizer_checks import check_optimizer_steps, required_arguments, small_copy_after_a_step


class Own(Optimizer):
    """Moves each parameter by `rule` of its gradient."""

    def __init__(self, parameters: Iterable[nn.Parameter], rule: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.rule, self.history = rule, []  # type: ignore[var-annotated]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.history.append(len(self.param_groups))
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["seen"] = True
                    parameter.sub_(group["lr"] * self.rule(parameter.grad))


class Uncopied:
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copy")


def parameters() -> list[nn.Parameter]:
    return list(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(3, 2)).parameters())


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, Adagrad, RMSprop])
@pytest.mark.parametrize("sharded", [False, True])
def test_torchs_elementwise_ones_are_taken_and_left_as_they_were(kind: Any, sharded: bool) -> None:
    optimizer = kind(parameters(), lr=0.1)
    before = [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]
    torch.manual_seed(5)
    check_optimizer_steps(optimizer, sharded=sharded)
    assert torch.initial_seed() == 5
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    after = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    fresh = kind(parameters(), lr=0.1)
    assert len(optimizer.state) == len(fresh.state)


@pytest.mark.parametrize(
    ("rule", "whole"),
    [
        (lambda gradient: gradient.sign(), False),
        (lambda gradient: gradient - gradient.mean(), True),
        (lambda gradient: gradient / (gradient.norm() + 1e-6), True),
        (lambda gradient: gradient.cumsum(0), True),
    ],
)
def test_an_optimizer_that_looks_across_a_parameter_steps_whole_ones_with_fsdp_alone(rule: Any, whole: bool) -> None:
    optimizer = Own(parameters(), rule)
    assert check_optimizer_steps(optimizer, sharded=False) is False
    assert check_optimizer_steps(optimizer, sharded=True) is whole
    assert (optimizer.history, dict(optimizer.state)) == ([], {})


class Together(Own):
    """Divides by the norm of all gradients together."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        given = [parameter for group in self.param_groups for parameter in group["params"]]
        norm = sum(float(parameter.grad.square().sum()) for parameter in given) + 1.0
        for parameter in given:
            parameter.sub_(0.1 * parameter.grad / norm)


class Counting(Own):
    """Keeps the number of parameters that it has stepped in its groups, and looks across each."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            group["seen"] = len(group["params"])


@pytest.mark.parametrize(
    ("kind", "rule", "words"),
    [
        (Own, lambda gradient: gradient + torch.randn_like(gradient), "draws random numbers"),
        (Together, None, "looks across parameters"),
        (Counting, lambda gradient: gradient - gradient.mean(), "has values in its groups that depend on the"),
    ],
)
def test_one_that_cannot_step_some_of_the_parameters_is_refused_with_fsdp_alone(
    kind: Any, rule: Any, words: str
) -> None:
    optimizer = kind(parameters(), rule)
    assert check_optimizer_steps(optimizer, sharded=False) is False
    with pytest.raises(
        ConfigError, match=rf'^strategy="fsdp": {kind.__name__} gives other values on a part .* {words}'
    ):
        check_optimizer_steps(optimizer, sharded=True)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (SparseAdam, "SparseAdam.step raised RuntimeError when it was tried on small parameters: SparseAdam does not"),
        (partial(Adam, differentiable=True), "Adam.step raised RuntimeError"),
        (partial(Own, rule=lambda gradient: 1 / 0), "Own.step raised ZeroDivisionError"),
    ],
)
def test_one_whose_step_fails_is_refused_by_its_words(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check_optimizer_steps(make(parameters()), sharded=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sgd_in_16_bits_steps_whole_parameters_with_fsdp_alone(dtype: torch.dtype) -> None:
    given = [nn.Parameter(torch.zeros(3, 2, dtype=dtype))]
    assert check_optimizer_steps(SGD(given, lr=0.1), sharded=False) is False
    assert check_optimizer_steps(AdamW(given, lr=0.1), sharded=True) is False
    assert check_optimizer_steps(SGD(given, lr=0.1), sharded=True) is True


@pytest.mark.parametrize("kind", [torch.optim.Muon, torch.optim.Adafactor, torch.optim.Rprop])
def test_torchs_optimizers_that_look_across_a_parameter_step_whole_ones(kind: Any) -> None:
    given = [nn.Parameter(torch.zeros(3, 2)) for _ in range(4)]
    assert check_optimizer_steps(kind(given), sharded=True) is True


def test_a_state_dict_of_another_form_is_refused() -> None:
    optimizer = Own(parameters(), torch.sign)
    optimizer.state_dict = lambda: {"mine": 1}  # type: ignore[method-assign,assignment]
    with pytest.raises(ConfigError, match="one of Own without param_groups and state"):
        check_optimizer_steps(optimizer, sharded=False)


def test_one_that_cannot_be_copied_is_not_tried() -> None:
    optimizer = Own(parameters(), lambda gradient: 1 / 0)
    optimizer.more = Uncopied()  # type: ignore[attr-defined]
    assert check_optimizer_steps(optimizer, sharded=True) is False
    assert optimizer.history == []


def test_parameters_of_all_dtypes_and_dimensions_are_tried() -> None:
    shapes = [((), torch.float32), ((3,), torch.bfloat16), ((2, 0), torch.float64), ((2, 2, 2), torch.complex64)]
    given = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in shapes]
    assert check_optimizer_steps(Adam(given), sharded=True) is False


def test_the_arguments_without_defaults_are_named() -> None:
    assert required_arguments(lambda a, b=1, *c, d, **e: None) == ["a", "d"]
    assert required_arguments(min) == []  # its signature is not known


def test_a_copy_steps_itself_under_a_schedule_too() -> None:
    optimizer = Adam(parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = [parameter.detach().clone() for parameter in optimizer.param_groups[0]["params"]]
    copied = small_copy_after_a_step(optimizer)
    assert copied is not None
    assert len(copied.state) == len(before)
    assert len(optimizer.state) == 0
