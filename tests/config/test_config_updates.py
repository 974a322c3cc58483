"""Several updates in a Config: by position or by name, described and overridden by name, each problem in its words."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import Config, Update
from disttrain.config import apply_overrides, blocking_differences, describe, settable
from disttrain.errors import ConfigError


def forward(model: Any, batch: Any) -> Any:
    return model(batch).mean(), None


def parameters(model: Any) -> Any:
    return model.parameters()


def config(**changes: Any) -> Config:
    defaults: dict[str, Any] = {
        "model": partial(nn.Linear, 2, 1),
        "train_data": lambda: None,
        "global_batch_size": 8,
        "max_steps": 4,
        "updates": [
            Update("d", parameters, forward, partial(torch.optim.Adam, lr=1e-3)),
            Update("g", parameters, forward, torch.optim.SGD, every=2),
        ],
    }
    return Config(**(defaults | changes))


def test_updates_are_kept_by_name_in_their_order() -> None:
    assert list(config().updates) == ["d", "g"]
    first = config()
    assert config(updates=first.updates).updates == first.updates
    by_name = Update(name="d", parameters=parameters, forward=forward, optimizer=torch.optim.SGD, every=3)
    assert by_name == Update("d", parameters, forward, torch.optim.SGD, every=3)


def test_the_description_has_the_fields_of_each_by_name() -> None:
    described = describe(config())
    assert described["updates.d.optimizer.lr"] == 1e-3
    assert described["updates.g.every"] == 2
    assert described["optimizer"] is None
    assert "updates" not in described


def test_a_config_without_updates_is_described_as_before() -> None:
    plain = config(updates=[], optimizer=torch.optim.SGD, loss=nn.MSELoss())
    old = {key: value for key, value in describe(plain).items() if key != "updates"}
    assert blocking_differences(old, describe(plain)) == []


def test_the_length_of_a_run_may_change_unless_an_update_has_a_schedule() -> None:
    longer = {"max_steps": 8}
    assert blocking_differences(describe(config()), describe(config(**longer))) == []
    with_schedule = [Update("d", parameters, forward, torch.optim.SGD, lambda optimizer, total_steps: None)]
    differing = blocking_differences(
        describe(config(updates=with_schedule)), describe(config(updates=with_schedule, **longer))
    )
    assert [difference.field for difference in differing] == ["max_steps"]


def test_overrides_reach_the_fields_and_the_keywords_of_an_update() -> None:
    changed = apply_overrides(
        config(), ["updates.d.optimizer.lr=0.5", "updates.g.every=3", "updates.g.grad_clip_norm=1"]
    )
    described = describe(changed)
    assert described["updates.d.optimizer.lr"] == 0.5
    assert (described["updates.g.every"], described["updates.g.grad_clip_norm"]) == (3, 1.0)
    assert described["updates.d.every"] == 1
    assert {"updates.d.every", "updates.d.optimizer.lr", "updates.g.grad_clip_norm"} <= set(settable(config()))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("updates.x.every=2", "updates has no x; it has d and g."),
        ("updates.d.evry=2", "updates.d has no evry; did you mean updates.d.every?"),
        ("updates.d.every=x", "expected int > 0, got 'x'."),
        ("updates.d.forward=x", "a function cannot be given as text; set updates.d.forward in the cfg.py."),
        ("updates.d.optimizer.lrr=1", "Adam takes no lrr; did you mean updates.d.optimizer.lr?"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(config(), [override])
    assert str(caught.value) == f"{override}: {message}"


@pytest.mark.parametrize(
    ("given", "named", "message"),
    [
        (("d",), {}, "parameters: missing; expected (model) -> parameters."),
        (("d", 1, forward, torch.optim.SGD), {}, "parameters: expected (model) -> parameters, got 1."),
        (("d", parameters, forward, torch.optim.SGD), {"every": 0}, "every: expected int > 0, got 0."),
        (("d", parameters, forward, torch.optim.SGD), {"name": "e"}, "expected name of an Update once"),
        ((*"abcdefgh",), {}, "expected Update(name, parameters, forward, optimizer, schedule, every, grad_clip_norm)"),
    ],
)
def test_an_update_names_what_it_lacks(given: Any, named: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Update(*given, **named)
    assert message in str(caught.value)


def test_a_value_that_is_out_of_bounds_is_named_with_its_update() -> None:
    for wrong in (lambda: apply_overrides(config(), ["updates.d.every=0"]), lambda: Update("d", None, 3, 4, every=0)):
        with pytest.raises(ConfigError, match=r"(?m)^updates\.d\.every: expected int > 0, got 0\.$"):
            wrong()
