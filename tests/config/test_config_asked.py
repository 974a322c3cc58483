"""A function that asks for parts of a run by the names of its arguments gets them by name; others by position."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from config_samples import refused, sample

from disttrain.config import apply_overrides, settable
from disttrain.config.annotations import FieldNote
from disttrain.config.asked import arguments, asked, unknown
from disttrain.errors import ConfigError

NOTE = FieldNote(takes="(parameters) -> Optimizer", asks=("model", "loss"))
PARTS = {"model": "M", "loss": "L"}


def by_model(model, lr=0.1):  # type: ignore[no-untyped-def]
    return ("model", model, lr)


def by_both(params, *, model, loss):  # type: ignore[no-untyped-def]
    return (params, model, loss)


def last(lr, model):  # type: ignore[no-untyped-def]
    return ("last", lr, model)


def only_by_position(model, /, lr=0.1):  # type: ignore[no-untyped-def]
    return ("position", model, lr)


def plain(parameters, model=None):  # type: ignore[no-untyped-def]
    return (parameters, model)


class Own:
    def __init__(self, model: Any, **options: Any) -> None:
        self.made = ("own", model, options)

    def __eq__(self, other: object) -> bool:
        return self.made == other

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("function", "names", "made"),
    [
        (by_model, ["model"], ("model", "M", 0.1)),
        (partial(by_model, lr=3), ["model"], ("model", "M", 3)),
        (by_both, ["params", "model", "loss"], ("P", "M", "L")),
        (partial(last, 0.5), ["model"], ("last", 0.5, "M")),
        (partial(last, lr=0.5), ["model"], ("last", 0.5, "M")),
        (only_by_position, ["model"], ("position", "M", 0.1)),
        (Own, ["model"], ("own", "M", {})),
        (plain, [], ("P", None)),
        (partial(by_both, model="mine", loss=3), [], ("P", "mine", 3)),
        (max, [], "P"),
    ],
)
def test_arguments_without_a_default_are_given_by_name(
    function: Callable[..., Any], names: list[str], made: object
) -> None:
    assert asked(function, NOTE) == names
    assert unknown(function, NOTE) == []
    by_position, by_name = arguments(function, NOTE, ["P"], PARTS)
    assert function(*by_position, **by_name) == made


def test_an_argument_that_nobody_gives_is_named() -> None:
    message = refused(optimizer=last)
    assert "optimizer: expected a function that takes model alone, got the function last, which needs lr too" in message
    assert "by partial(FUNCTION, lr=...)" in message


def test_a_part_that_the_config_has_not_is_named() -> None:
    assert "optimizer: it asks for forward, but the config has none; it has model and loss" in refused(
        optimizer=lambda model, forward: None
    )
    assert sample(optimizer=lambda model, loss: None).forward is None


def test_overrides_set_the_other_arguments() -> None:
    config = sample(optimizer=partial(last, lr=0.5))
    assert [key for key in settable(config) if key.startswith("optimizer")] == ["optimizer.lr"]
    assert apply_overrides(config, ["optimizer.lr=0.25"]).optimizer.keywords == {"lr": 0.25}
    assert apply_overrides(sample(optimizer=by_model), ["optimizer.lr=0.25"]).optimizer("M") == ("model", "M", 0.25)
    with pytest.raises(ConfigError, match="last takes no model"):
        apply_overrides(config, ["optimizer.model=3"])
