"""Reads the text after `key=` as a value of the expected type.

*Contract*: for int, float and str, `parse` turns `str(value)` back into the value. true, false and none (or null) may
be in any case. Tuples, lists and dicts are Python literals.

*Errors*: ConfigError with the text, and with the type that was expected.
"""

import ast
import inspect
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from disttrain.config.annotations import alternatives, type_text
from disttrain.config.wording import got
from disttrain.errors import ConfigError

Missing = inspect.Parameter.empty

_BOOLS = {"true": True, "false": False}
_PLAIN = (bool, int, float, str, tuple, list, dict, types.NoneType)


def parse(key: str, text: str, forms: Sequence[Any], expected: str) -> Any:
    """Return `text` as a value of the first type of `forms` that fits; None, bool and numbers come before strings.

    *Errors*: ConfigError that names `expected`.
    """
    for form in sorted(map(plain_type, forms), key=_precedence):
        try:
            return _value_of_type(form, text)
        except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
            continue
    spelled = re.sub(r"\bbool\b", "true | false", re.sub(r"\bNone\b", "none", expected)).replace('"', "")
    raise ConfigError(f"{key}={text}: expected {spelled}, got {text!r}.")


def parse_keyword(key: str, text: str, present: Any, parameter: inspect.Parameter | None) -> Any:
    """Return `text` as a value for the keyword of a function.

    The expected type is that of the present value, that of the parameter's default, or the annotation. Without any of
    these, every Python literal is accepted.

    *Errors*: ConfigError for another type, and for a present value that text cannot replace.
    """
    default = parameter.default if parameter else Missing
    forms = [type(value) for value in (present, default) if value is not Missing]
    annotation = parameter.annotation if parameter else Missing
    forms += alternatives(annotation) if annotation is not Missing else []
    forms = list(dict.fromkeys(plain_type(form) for form in forms))
    known = [form for form in forms if form in _PLAIN or get_origin(form) is Literal]
    if any(get_origin(form) is Literal for form in known):
        known = [form for form in known if form is not str]
    replaceable = present is Missing or type(present) in _PLAIN
    if not replaceable:
        raise ConfigError(
            f"{key}={text}: expected a number, text, tuple, list or dict to replace, got {got(present)}; "
            "change it in the cfg.py."
        )
    if set(known) <= {types.NoneType}:
        return parse(key, text, [object], "a Python literal such as 3, 0.1, true, 'text' in quotes or (1, 2)")
    return parse(key, text, known, " | ".join(map(type_text, sorted(known, key=_none_last))))


def _none_last(form: Any) -> bool:
    return form is types.NoneType


def plain_type(form: Any) -> Any:
    """Return the plain type of a generic one: tuple for `tuple[int, ...]`, dict for `Mapping[str, str]`."""
    origin = get_origin(form)
    if origin is Mapping:
        return dict
    return origin if origin in _PLAIN else form


def _precedence(form: Any) -> int:
    """Return the place of a type in the order in which types are tried: narrow types come first."""
    order = [types.NoneType, bool, int, float, tuple, list, dict, str, object]
    return order.index(form) if form in order else 4  # a Literal


def _value_of_type(form: Any, text: str) -> Any:
    """Return `text` as a value of one type, or raise the error of int, of a dict or of `ast.literal_eval`."""
    if form is str:
        return text
    word = text.strip()
    if form is types.NoneType:
        return {"none": None, "null": None}[word.lower()]
    if form is bool:
        return _BOOLS[word.lower()]
    if form in (int, float):
        return form(word)
    if get_origin(form) is Literal:
        return {str(choice): choice for choice in get_args(form)}[word]
    if form is object and word.lower() in ("none", "null", *_BOOLS):
        return _BOOLS.get(word.lower())
    value = ast.literal_eval(word)
    if form in (tuple, list) and isinstance(value, tuple | list):
        return form(value)
    if not isinstance(value, form):
        raise ValueError(word)
    return value
