"""The parts of a run that a function of a Config asks for, by the names of its arguments.

*Contract*: a function asks for a part if one of its arguments without a default has the part's name: pytest gives
fixtures in the same way. Such a function gets every argument without a default by its name. All other functions get
theirs by position. Only signatures are read.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from disttrain.config.annotations import FieldNote

PARAMETERS = ("parameters", "params")
"""The names by which a function that asks for a part gets what others get by position."""


def required_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments without a default; none if Python does not know the signature."""
    return [parameter.name for parameter in _required(function)]


def _required(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each for each in parameters if each.default is each.empty and each.kind not in several]


def asked(function: Callable[..., Any], note: FieldNote) -> list[str]:
    """Return the names of the arguments that the run gives by name; none for a function that asks for no part."""
    names = required_names(function)
    if not set(names) & set(note.asks):
        return []
    return [name for name in names if name in (*note.asks, *PARAMETERS)]


def unknown(function: Callable[..., Any], note: FieldNote) -> list[str]:
    """Return the arguments without a default that nobody gives to a function which asks for parts."""
    names = asked(function, note)
    return [name for name in required_names(function) if name not in names] if names else []


def arguments(
    function: Callable[..., Any], note: FieldNote, by_position: Sequence[Any], by_name: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Return the arguments, by position and by keyword, with which the run calls a function.

    `by_name`: the parts that it may ask for. A function that asks for none gets `by_position`.
    """
    if not asked(function, note):
        return list(by_position), {}
    values = {**by_name, **dict.fromkeys(PARAMETERS, by_position[0])}
    given = [each for each in _required(function) if each.name in values]
    first = [values[each.name] for each in given if each.kind is each.POSITIONAL_ONLY]
    return first, {each.name: values[each.name] for each in given if each.kind is not each.POSITIONAL_ONLY}
