"""Groups with and without weight decay: by type, number of dimensions and name, with exceptions."""

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from disttrain import ConfigError, parameter_groups


class ScaleNorm(nn.Module):
    """A norm of somebody's own, whose parameter has two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 4))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.lstm = nn.LSTM(4, 4)
        self.norms = nn.ModuleList([nn.LayerNorm((2, 4)), nn.BatchNorm1d(4), ScaleNorm()])
        self.expert_bias = nn.Parameter(torch.zeros(3, 4))
        self.scale = nn.Parameter(torch.ones(()))
        self.table = nn.Parameter(torch.zeros(5, 4))
        self.linear = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)


DECAYED = {
    *("attention.in_proj_weight", "attention.out_proj.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"),
    *("table", "linear.weight", "head.weight"),
}


def names(model: nn.Module, groups: list[dict[str, Any]]) -> dict[float, set[str]]:
    """Return the names in each group, by the group's weight decay."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["weight_decay"]: {by_id[id(each)] for each in group["params"]} for group in groups}


def test_biases_norms_embeddings_and_vectors_have_no_decay() -> None:
    model = Model()
    groups = names(model, parameter_groups(model, weight_decay=0.3))
    assert groups[0.3] == DECAYED
    assert groups[0.0] == {name for name, _ in model.named_parameters()} - DECAYED


@pytest.mark.parametrize("no_decay", [["linear.*"], ["linear.weight"], ["linear.w*", "linear.bias"]])
def test_a_pattern_fits_a_name_or_its_end(no_decay: list[str]) -> None:
    model = nn.ModuleDict({"inner": Model(), "linear": nn.Linear(2, 2)})
    decayed = names(model, parameter_groups(model, weight_decay=0.3, no_decay=no_decay))[0.3]
    assert decayed == {f"inner.{name}" for name in DECAYED} - {"inner.linear.weight"}


def test_a_class_stands_for_all_inside_modules_of_it() -> None:
    model = Model()
    groups = parameter_groups(model, weight_decay=0.3, no_decay=[nn.MultiheadAttention], decay=[nn.Embedding, "scale"])
    attention = {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert names(model, groups)[0.3] == DECAYED - attention | {"embedding.weight", "scale"}


def test_a_tied_weight_is_in_one_group_whatever_the_order_of_its_modules() -> None:
    for order in (("embedding", "head"), ("head", "embedding")):
        made = {"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5)}
        made["head"].weight = made["embedding"].weight
        model = nn.ModuleDict({name: made[name] for name in order})
        (group,) = parameter_groups(model, weight_decay=0.3)
        assert group["weight_decay"] == 0.0
        assert len(group["params"]) == 2
        assert [len(group["params"]) for group in parameter_groups(model, weight_decay=0.3, decay=["head.weight"])] == [
            1,
            1,
        ]


def test_frozen_parameters_are_left_out_or_taken() -> None:
    model = Model().requires_grad_(False)
    model.head.requires_grad_(True)
    assert names(model, parameter_groups(model, weight_decay=0.3)) == {0.3: {"head.weight"}, 0.0: {"head.bias"}}
    assert names(model, parameter_groups(model, weight_decay=0.3, frozen=True))[0.3] == DECAYED


def test_several_modules_may_overlap() -> None:
    model = Model()
    groups = parameter_groups(model.head, model, model.linear, weight_decay=0.3)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[0]["params"][0] is model.head.weight


def test_the_values_behind_a_computed_weight_are_those_of_its_module() -> None:
    model = nn.ModuleDict(
        {
            "linear": parametrizations.orthogonal(nn.Linear(4, 4)),
            "embedding": parametrizations.weight_norm(nn.Embedding(5, 4)),
            "biased": parametrizations.weight_norm(nn.Linear(4, 4), name="bias", dim=None),
        }
    )
    groups = names(model, parameter_groups(model, weight_decay=0.3))
    assert groups[0.3] == {"linear.parametrizations.weight.original", "biased.weight"}


def test_groups_train_as_those_written_by_hand() -> None:
    torch.manual_seed(3)
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    results = []
    for by_hand in (False, True):
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))
        groups = parameter_groups(model, weight_decay=0.5)
        if by_hand:
            decayed = [model[0].weight, model[2].weight]
            others = [model[0].bias, model[1].weight, model[1].bias, model[2].bias]
            groups = [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        results.append([parameter.detach() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("modules", "choice", "message"),
    [
        ([[nn.Parameter(torch.ones(2))]], {}, "expected Modules, got list; let the optimizer's factory ask for the"),
        ([Model()], {"no_decay": ["heads.*"]}, "no_decay has 'heads.*', which fits no parameter; expected a class"),
        ([Model()], {"decay": [nn.Conv2d]}, "decay has Conv2d, which fits no parameter"),
        ([Model()], {"no_decay": "bias"}, "expected a list of classes and patterns as no_decay, got one; use [...]"),
        ([Model()], {"no_decay": [3]}, "expected classes of Modules and patterns in no_decay, got 3"),
        ([Model()], {"no_decay": ["head.*"], "decay": [nn.Linear]}, "both no_decay and decay name head.weight"),
    ],
)
def test_wrong_use_is_refused_by_name(modules: list[Any], choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"parameter_groups: {message}")):
        parameter_groups(*modules, weight_decay=0.1, **choice)
