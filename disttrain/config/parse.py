"""The text after `key=` as a value of the type that is expected there.

Contract: `parse(str(value), ...)` gives the value back for int, float and str; true, false and none (or null)
are written in lower or any other case; tuples, lists and dicts as Python literals.
"""

import ast
import inspect
import re
import types
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from disttrain.config.annotations import alternatives, type_text
from disttrain.config.wording import got
from disttrain.errors import ConfigError

Missing = inspect.Parameter.empty

_BOOLS = {"true": True, "false": False}
_PLAIN = (bool, int, float, str, tuple, list, dict, types.NoneType)


def parse(where: str, text: str, forms: Sequence[Any], expected: str) -> Any:
    """Return `text` as the first of `forms` that it can be; None, bool and numbers are tried before strings.

    *Errors*: ConfigError that names `expected`.
    """
    for form in sorted(forms, key=_rank):
        try:
            return _as(form, text)
        except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
            continue
    spelled = re.sub(r"\bbool\b", "true | false", re.sub(r"\bNone\b", "none", expected)).replace('"', "")
    raise ConfigError(f"{where}={text}: expected {spelled}, got {text!r}.")


def parse_keyword(where: str, text: str, present: Any, parameter: inspect.Parameter | None) -> Any:
    """Return `text` as a value for a function's keyword.

    What is expected is the type of the present value, of the parameter's default, or its annotation; where
    they say nothing, any Python literal is taken.
    """
    default = parameter.default if parameter else Missing
    forms = [type(value) for value in (present, default) if value is not Missing]
    annotation = parameter.annotation if parameter else Missing
    forms += alternatives(annotation) if annotation is not Missing else []
    forms = list(dict.fromkeys(_plain(form) for form in forms))
    known = [form for form in forms if form in _PLAIN or get_origin(form) is Literal]
    if any(get_origin(form) is Literal for form in known):
        known = [form for form in known if form is not str]
    settable = present is Missing or present is None or type(present) in known
    if not settable:
        raise ConfigError(
            f"{where}={text}: expected a number, text, tuple, list or dict to replace, got {got(present)}; "
            "change it in the cfg.py."
        )
    if set(known) <= {types.NoneType}:
        return parse(where, text, [object], "a Python literal such as 3, 0.1, true, 'text' in quotes or (1, 2)")
    return parse(where, text, known, " | ".join(map(type_text, sorted(known, key=_none_last))))


def _none_last(form: Any) -> bool:
    return form is types.NoneType


def _plain(form: Any) -> Any:
    """Return a generic type's plain one: `tuple[int, ...]` is read as a tuple."""
    origin = get_origin(form)
    return origin if origin in _PLAIN else form


def _rank(form: Any) -> int:
    """In which order forms are tried: the narrower first."""
    order = [types.NoneType, bool, int, float, tuple, list, dict, str, object]
    return order.index(form) if form in order else 4  # a Literal


def _as(form: Any, text: str) -> Any:
    """Return `text` as one form, or raise what int, a dict or `ast.literal_eval` raise."""
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
