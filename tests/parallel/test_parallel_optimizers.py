"""Several optimizers as one object: their groups and states together, in a checkpoint each under its name."""

import pytest
import torch
from torch import nn

from disttrain.errors import ConfigError
from disttrain.evidence import state_tensors
from disttrain.parallel.counterparts import Counterparts
from disttrain.parallel.optimizers import Optimizers, by_prefix


def stepped() -> tuple[nn.ModuleDict, Optimizers]:
    model = nn.ModuleDict({"d": nn.Linear(2, 3), "g": nn.Linear(3, 2)})
    kinds = {"d": torch.optim.Adam, "g": torch.optim.SGD}
    together = Optimizers({name: kind(model[name].parameters(), lr=0.1) for name, kind in kinds.items()})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in together.by_name.values():
        optimizer.step()
    return model, together


def test_the_state_comes_back_by_name() -> None:
    _, first = stepped()
    _, second = stepped()
    second.by_name["d"].state[next(iter(second.by_name["d"].state))]["exp_avg"].zero_()
    second.load_state_dict(first.state_dict())
    there, here = (list(each.state.values()) for each in (first, second))
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(there[:2], here[:2], strict=True))
    assert [group["lr"] for group in first.param_groups] == [0.1, 0.1]


def test_paths_and_hashes_carry_the_name() -> None:
    model, together = stepped()
    assert list(by_prefix(together)) == ["optimizer.d", "optimizer.g"]
    assert list(by_prefix(together.by_name["d"])) == ["optimizer"]
    named = state_tensors({"model": model}, together)  # type: ignore[arg-type]
    assert "optimizer.d.d.weight.exp_avg" in named
    of = Counterparts({"model": model}, together, {}).of  # type: ignore[arg-type]
    assert of("optimizer.d.state.0.exp_avg", (3, 2)) is model["d"].weight
    assert of("optimizer.g.state.0.momentum_buffer", (2, 3)) is model["g"].weight
    assert of("optimizer.x.state.0.exp_avg", (3, 2)) is None


def test_a_handler_may_drop_the_gradients_of_all() -> None:
    model, together = stepped()
    together.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_groups_cannot_be_added() -> None:
    with pytest.raises(ConfigError, match=r"give the parameters to an Update in the cfg\.py"):
        stepped()[1].add_param_group({"params": []})
