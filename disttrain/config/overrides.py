"""`key=value` on the command line: any field of a Config and any keyword of its functions, by dotted name.

Contract: nothing is built and no function is called; signatures alone are read. The resulting Config is
checked as a whole, so overrides that only fit together may be given in any order; of two for one key the
later holds.

*Errors*: ConfigError for an unknown key (with the nearest ones), an ill-typed value, or a function given as text.
"""

import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from disttrain.config.annotations import PLAIN_KEY, Leaf, alternatives, is_group, leaves
from disttrain.config.checks import value_of
from disttrain.config.fields import Config, Declaration, replace
from disttrain.config.parse import Missing, parse, parse_keyword
from disttrain.config.wording import both, either, got, meant
from disttrain.errors import ConfigError


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Return the config with `key=value` texts laid over it."""
    changes: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {text!r}: expected KEY=VALUE, such as max_epochs=2 or optimizer.lr=3e-4.")
        _override(config, changes, key.strip(), value)
    return replace(config, **changes) if changes else config


def settable(config: Config) -> list[str]:
    """Return every key that an override may have, the keywords of the config's functions among them."""
    keys = []
    for leaf in leaves(type(config)):
        if not leaf.about.takes:
            keys.append(leaf.name)
        elif not leaf.about.within.startswith("list"):
            keys += _keywords(leaf.name, value_of(config, leaf.name), leaf.about.num_arguments)
    return keys


def _override(config: Config, changes: dict[str, Any], key: str, text: str) -> None:
    """Put what one override changes into `changes`."""
    head, *rest = key.split(".")
    leaf = {leaf.name: leaf for leaf in leaves(type(config))}.get(key)
    present = changes.get(head, getattr(config, head, None))
    if leaf is not None:
        value = _plain_value(config, leaf, text)
        changes[head] = {**_fields(present), rest[0]: value} if rest else value
    elif head not in type(config).model_fields:
        raise ConfigError(f"{key}={text}: no such field{meant(key, settable(config)) or '; --help lists them.'}")
    elif is_group(type(config).model_fields[head].annotation):
        keys = [leaf.name for leaf in leaves(type(config)) if leaf.name.startswith(f"{head}.")]
        wrong = f"no such field{meant(key, keys)}" if rest else f"{head} is a group of fields"
        raise ConfigError(f"{key}={text}: " + (wrong if wrong.endswith("?") else f"{wrong}; it has {both(keys)}."))
    else:
        number = next((leaf.about.num_arguments for leaf in leaves(type(config)) if leaf.name == head), 0)
        changes[head] = _within(config, key, head, present, rest, text, number)


def _fields(group: Any) -> dict[str, Any]:
    return dict(group) if isinstance(group, Declaration | dict) else {}


def _plain_value(config: Config, leaf: Leaf, text: str) -> Any:
    """Return the value of a field that is no function."""
    forms = alternatives(leaf.info.annotation)
    if not leaf.about.takes:
        return parse(leaf.name, text, forms, leaf.type_text)
    if types.NoneType in forms and text.strip().lower() in ("none", "null"):
        return None
    raise _only_in_cfg(config, leaf.name, text)


def _only_in_cfg(config: Config, key: str, text: str) -> ConfigError:
    """Return the error for a function given as text, with what can be given instead."""
    keys = [known for known in settable(config) if known.startswith(f"{key}.")][:5]
    instead = f", or here its keywords: {either(keys)}" if keys else ""
    return ConfigError(f"{key}={text}: a function cannot be given as text; set {key} in the cfg.py{instead}.")


def _within(config: Config, key: str, where: str, value: Any, path: list[str], text: str, num_given: int) -> Any:
    """Return `value` (a function, or a dict) with the thing at `path` inside it changed."""
    name, *rest = path
    if isinstance(value, Mapping):
        if name not in value:
            near = meant(f"{where}.{name}", [f"{where}.{known}" for known in value])
            raise ConfigError(f"{key}={text}: {where} has no {name}{near or _known(value)}")
        return {**value, name: _at(config, key, f"{where}.{name}", value[name], rest, text, None)}
    if not _is_function(value):
        raise ConfigError(
            f"{key}={text}: expected {where} to be a function or a partial that takes {name}, "
            f"got {got(value)}; change it in the cfg.py."
        )
    function = value if isinstance(value, partial) else partial(value)
    parameters = _parameters(function, num_given)
    if name not in function.keywords and name not in parameters and not _takes_any(function):
        near = meant(f"{where}.{name}", [f"{where}.{known}" for known in parameters])
        raise ConfigError(f"{key}={text}: {_name(function)} takes no {name}{near or _known(parameters)}")
    present = function.keywords.get(name, Missing)
    changed = _at(config, key, f"{where}.{name}", present, rest, text, parameters.get(name))
    return partial(function.func, *function.args, **{**function.keywords, name: changed})


def _at(
    config: Config, key: str, where: str, present: Any, rest: list[str], text: str, parameter: inspect.Parameter | None
) -> Any:
    """Return the new value of one keyword or key: parsed, or the present one with something inside it changed."""
    if rest:
        return _within(config, key, where, None if present is Missing else present, rest, text, 0)
    replaced = parameter.default if present is Missing and parameter else present
    if callable(replaced) and replaced is not Missing:
        raise _only_in_cfg(config, key, text)
    return parse_keyword(key, text, present, parameter)


def _is_function(value: Any) -> bool:
    return inspect.isroutine(value) or inspect.isclass(value) or isinstance(value, partial)


def _name(function: "partial[Any]") -> str:
    return str(getattr(function.func, "__name__", "the function"))


def _known(names: Mapping[str, Any]) -> str:
    return f"; it has {both(names)}." if names else "."


def _signature(function: "partial[Any]") -> inspect.Signature:
    """Return what the function takes; nothing where python cannot tell."""
    try:
        plain = inspect.signature(function.func)
    except (TypeError, ValueError):
        return inspect.Signature()
    try:
        return inspect.signature(function.func, eval_str=True)
    except (NameError, AttributeError, SyntaxError, TypeError):  # annotations that only a type checker can resolve
        return plain


def _parameters(function: "partial[Any]", num_given: int) -> dict[str, inspect.Parameter]:
    """Return the parameters that can be given by name: not the first ones, which the caller or the partial gives."""
    parameters = list(_signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    taken = positional[: len(function.args) + num_given]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in taken]
    return {parameter.name: parameter for parameter in named}


def _takes_any(function: "partial[Any]") -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in _signature(function).parameters.values())


def _keywords(where: str, value: Any, num_given: int) -> Iterator[str]:
    """Yield the keys below a function or a dict of functions."""
    if isinstance(value, Mapping):
        for name in value:
            if isinstance(name, str) and PLAIN_KEY.fullmatch(name):
                yield from _keywords(f"{where}.{name}", value[name], 0)
    elif _is_function(value):
        function = value if isinstance(value, partial) else partial(value)
        yield from (f"{where}.{name}" for name in {**function.keywords, **_parameters(function, num_given)})
