"""The groups of parameters that FSDP2 gathers together, and the models and optimizers that cannot be sharded."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disttrain.errors import ConfigError
from disttrain.parallel import Slots, World, strategy_for
from disttrain.parallel.groups import groups_of, needs_whole, own_parameters

CPU = torch.device("cpu")


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def test_groups_are_the_children_of_lists_and_the_model_itself_is_last() -> None:
    model = Blocks()
    assert groups_of(model) == [*model.blocks, model]
    nested = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ReLU(), nn.ModuleList([nn.Linear(2, 2)]))
    assert groups_of(nested) == [nested[0], nested[2][0], nested]
    nested[0][1].weight = nested[2][0].weight  # tied: a weight of two children belongs to the model's own group
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
def test_a_model_that_cannot_be_cut_is_refused_on_one_rank_too(build: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        strategy_for("fsdp", build(), World(slots=Slots(1), device=CPU))
    assert message in str(caught.value)


ELEMENTWISE = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax", "ASGD", "Rprop"]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_optimizers_that_docs_name_step_a_part_as_a_part_of_the_whole(name: str) -> None:
    """A kernel may treat the last elements of a tensor differently: a cut moves them, and must not change the bits."""
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
    ("make", "reason"),
    [
        (torch.optim.LBFGS, "LBFGS needs whole parameters"),
        (torch.optim.Muon, "Muon needs whole parameters"),
        (torch.optim.Adafactor, "Adafactor needs whole parameters"),
        (lambda parameters: torch.optim.SGD(parameters, fused=True), "SGD(fused=True) rounds the last elements"),
        (
            lambda parameters: torch.optim.SGD([nn.Parameter(p.data.bfloat16()) for p in parameters]),
            "over parameters of torch.bf",
        ),
        (torch.optim.AdamW, None),
    ],
)
def test_optimizers_that_need_whole_parameters_are_named_as_such(make: Any, reason: str | None) -> None:
    found = needs_whole(make([nn.Parameter(torch.zeros(2, 2))]))
    assert found == reason or reason in str(found)


def test_an_optimizer_that_gets_such_groups_later_is_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 31), nn.Tanh(), nn.Linear(31, 10))
    layout = strategy_for("fsdp", model, World(slots=Slots(1), device=CPU)).layout
    optimizer = torch.optim.SGD(model[0].parameters())
    layout.check_optimizer(optimizer)
    optimizer.add_param_group({"params": list(model[2].parameters()), "fused": True})
    with pytest.raises(ConfigError, match=r"rounds the last elements .* when it is built"):
        layout.check_optimizer(optimizer)
    layout.step_whole(optimizer)
    layout.check_optimizer(optimizer)


def test_a_parameter_belongs_to_the_innermost_group() -> None:
    model = Blocks()
    assert own_parameters(groups_of(model)) == [
        ["weight", "bias"],
        ["weight", "bias"],
        ["embed.weight", "embed.bias"],
    ]
