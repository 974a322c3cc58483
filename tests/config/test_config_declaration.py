"""A Declaration is frozen, refuses unknown fields, and says each problem in one line of its own."""

from typing import ClassVar

import pytest
from pydantic import ValidationError

from disttrain.config.declaration import Declaration
from disttrain.errors import ConfigError


class Tea(Declaration):
    prefix: ClassVar[str] = "tea."
    minutes: int = 3
    """How long it draws."""
    validate: bool = False  # type: ignore[assignment]  # a field may have this name
    """Whether somebody tastes it."""


def test_each_problem_is_one_line_with_the_dotted_name() -> None:
    with pytest.raises(ConfigError) as caught:
        Tea(minutes="long", minuts=4)  # type: ignore[call-arg, arg-type]
    assert str(caught.value).splitlines() == [
        "tea.minutes: expected int, got 'long'.",
        "tea.minuts: no such field; did you mean tea.minutes?",
    ]


def test_it_is_frozen_and_a_field_may_be_called_validate() -> None:
    assert Tea(validate=True).validate is True  # type: ignore[arg-type, comparison-overlap]
    with pytest.raises(ValidationError, match="frozen"):
        Tea().minutes = 4  # type: ignore[misc]
