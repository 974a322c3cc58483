"""Applies `key=value` from the command line: the key is a field, or a keyword of a function, by dotted name.

*Contract*: nothing is built and no function is called; only signatures are read. The resulting Config is checked as a
whole, so overrides that fit only together may come in any order. If two overrides have one key, the later one counts.

*Errors*: ConfigError for an unknown key (with the nearest ones), a value of the wrong type, or a function given as
text.
"""

import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from disttrain.config.annotations import PLAIN_KEY, FieldNote, Leaf, alternatives, is_group, leaves, value_of
from disttrain.config.asked import asked
from disttrain.config.declaration import Declaration
from disttrain.config.fields import Config, replace
from disttrain.config.parse import Missing, parse, parse_keyword, plain_type
from disttrain.config.wording import both, did_you_mean, either, got
from disttrain.errors import ConfigError


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Return a copy of the config with the `key=value` texts applied."""
    changes: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override {text!r}: expected KEY=VALUE, such as max_epochs=2 or optimizer.lr=3e-4.")
        _override(config, changes, key.strip(), value)
    return replace(config, **changes) if changes else config


def settable(config: Config) -> list[str]:
    """Return every key that an override may have, including the keywords of the config's functions."""
    keys = []
    for leaf in leaves(type(config)):
        if not leaf.note.takes:
            keys.append(leaf.name)
        elif not leaf.note.within.startswith("list"):
            keys += _keywords(leaf.name, value_of(config, leaf.name), leaf.note)
    for name, update in config.updates.items():
        for leaf in leaves(type(update)):
            if leaf.note.takes:
                keys += _keywords(f"updates.{name}.{leaf.name}", getattr(update, leaf.name), leaf.note)
            elif leaf.name != "name":
                keys.append(f"updates.{name}.{leaf.name}")
    return keys


def _override(config: Config, changes: dict[str, Any], key: str, text: str) -> None:
    """Add the change that one override makes to `changes`."""
    head, *rest = key.split(".")
    leaf = {leaf.name: leaf for leaf in leaves(type(config))}.get(key)
    present = changes.get(head, getattr(config, head, None))
    if leaf is not None:
        value = _field_value(config, leaf, text)
        changes[head] = {**_fields(present), rest[0]: value} if rest else value
    elif head not in type(config).model_fields:
        raise ConfigError(f"{key}={text}: no such field{did_you_mean(key, settable(config)) or '; --help lists them.'}")
    elif not rest and (short := getattr(type(config).model_fields[head].annotation, "short_form", "")):
        _override(config, changes, f"{head}.{short}", text)
    elif is_group(type(config).model_fields[head].annotation):
        keys = [leaf.name for leaf in leaves(type(config)) if leaf.name.startswith(f"{head}.")]
        reason = f"no such field{did_you_mean(key, keys)}" if rest else f"{head} is a group of fields"
        raise ConfigError(f"{key}={text}: " + (reason if reason.endswith("?") else f"{reason}; it has {both(keys)}."))
    else:
        note = next((leaf.note for leaf in leaves(type(config)) if leaf.name == head), FieldNote())
        changes[head] = _changed(config, key, head, present, rest, text, note)


def _fields(group: Any) -> dict[str, Any]:
    """Return the fields of a group that were given: a rule may ask for one beside another."""
    if isinstance(group, Declaration):
        return {name: getattr(group, name) for name in group.model_fields_set}
    return group if isinstance(group, dict) else {}


def _field_value(config: Config, leaf: Leaf, text: str) -> Any:
    """Return the value of a field from text. A function cannot be text, except none where None is allowed."""
    forms = alternatives(leaf.info.annotation)
    if not leaf.note.takes:
        return parse(leaf.name, text, list(dict.fromkeys(map(plain_type, forms))), leaf.type_text)
    if types.NoneType in forms and text.strip().lower() in ("none", "null"):
        return None
    raise _only_in_cfg(config, leaf.name, text)


def _only_in_cfg(config: Config, key: str, text: str) -> ConfigError:
    """Return the error for a function given as text, with the keywords that can be given instead."""
    keys = [known for known in settable(config) if known.startswith(f"{key}.")][:5]
    instead = f", or here its keywords: {either(keys)}" if keys else ""
    return ConfigError(f"{key}={text}: a function cannot be given as text; set {key} in the cfg.py{instead}.")


def _changed(config: Config, key: str, prefix: str, value: Any, path: list[str], text: str, note: FieldNote) -> Any:
    """Return a copy of `value`, a function or a dict with the dotted name `prefix`, with the part at `path` changed."""
    name, *rest = path
    dotted = f"{prefix}.{name}"
    if isinstance(value, Mapping):
        by_text = {str(known): known for known in value}
        if name not in by_text:
            near = did_you_mean(dotted, [f"{prefix}.{known}" for known in value])
            raise ConfigError(f"{key}={text}: {prefix} has no {name}{near or _known(value)}")
        known = by_text[name]  # the steps of a Mixture's changes are integers
        return {**value, known: _changed_part(config, key, dotted, value[known], rest, text, None)}
    if isinstance(value, Declaration):
        return _changed_declaration(config, key, prefix, value, path, text)
    if not _is_function(value):
        raise ConfigError(
            f"{key}={text}: expected {prefix} to be a function or a partial that takes {name}, "
            f"got {got(value)}; change it in the cfg.py."
        )
    function = value if isinstance(value, partial) else partial(value)
    parameters = _parameters(function, note)
    if name not in function.keywords and name not in parameters and not _takes_any(function):
        near = did_you_mean(dotted, [f"{prefix}.{known}" for known in parameters])
        raise ConfigError(f"{key}={text}: {_name(function)} takes no {name}{near or _known(parameters)}")
    present = function.keywords.get(name, Missing)
    keyword = _changed_part(config, key, dotted, present, rest, text, parameters.get(name))
    return partial(function.func, *function.args, **{**function.keywords, name: keyword})


def _changed_declaration(config: Config, key: str, prefix: str, value: Declaration, path: list[str], text: str) -> Any:
    """Return a copy of one of several updates with a field, or a keyword of one of its functions, changed."""
    name, *rest = path
    by_field = {leaf.name: leaf for leaf in leaves(type(value)) if leaf.name != "name"}
    if name not in by_field:
        near = did_you_mean(f"{prefix}.{name}", [f"{prefix}.{known}" for known in by_field])
        raise ConfigError(f"{key}={text}: {prefix} has no {name}{near or _known(by_field)}")
    leaf = by_field[name]._replace(name=key)
    if rest:
        new = _changed(config, key, f"{prefix}.{name}", getattr(value, name), rest, text, leaf.note)
    else:
        new = _field_value(config, leaf, text)
    return type(value)(**{**_fields(value), name: new})


def _changed_part(
    config: Config, key: str, dotted: str, present: Any, rest: list[str], text: str, parameter: inspect.Parameter | None
) -> Any:
    """Return the new value of one keyword or key: parsed from text, or the present one with a part of it changed."""
    if rest:
        return _changed(config, key, dotted, None if present is Missing else present, rest, text, FieldNote())
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
    """Return the signature of the function; an empty one if Python does not know it."""
    try:
        plain = inspect.signature(function.func)
    except (TypeError, ValueError):
        return inspect.Signature()
    try:
        return inspect.signature(function.func, eval_str=True)
    except (NameError, AttributeError, SyntaxError, TypeError):  # annotations that only a type checker can resolve
        return plain


def _parameters(function: "partial[Any]", note: FieldNote) -> dict[str, inspect.Parameter]:
    """Return the parameters that an override can set; the run or the partial gives the others."""
    parameters = list(_signature(function).parameters.values())
    if by_name := asked(function, note):
        parameters = [p for p in parameters if p.name not in by_name]
    num_given = 0 if by_name else note.num_arguments
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    taken = positional[: len(function.args) + num_given]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in taken]
    return {parameter.name: parameter for parameter in named}


def _takes_any(function: "partial[Any]") -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in _signature(function).parameters.values())


def _keywords(prefix: str, value: Any, note: FieldNote) -> Iterator[str]:
    """Yield the keys of the keywords of a function, or of the functions in a dict."""
    if isinstance(value, Mapping):
        for name in value:
            if isinstance(name, str) and PLAIN_KEY.fullmatch(name):
                yield from _keywords(f"{prefix}.{name}", value[name], FieldNote())
    elif _is_function(value):
        function = value if isinstance(value, partial) else partial(value)
        yield from (f"{prefix}.{name}" for name in {**function.keywords, **_parameters(function, note)})
