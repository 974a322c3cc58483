"""A Config as plain values: the same text for the same run on every rank, process and machine.

Contract: `describe` gives one flat dict of dotted names to JSON values. A function stands there by its
qualified name, the cfg.py's module always as `cfg`; the keywords of a partial by dotted names of their own
(`optimizer.lr`), as overrides name them; an object by its repr without addresses; a tensor by its hash. What
a function does is not looked at: change its body and the description stays.
"""

import enum
import functools
import hashlib
import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, TypeAlias

import numpy as np

from disttrain.config.annotations import PLAIN_KEY, leaves
from disttrain.config.checks import value_of
from disttrain.config.fields import Config

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
Description: TypeAlias = dict[str, JSON]

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def describe(config: Config) -> Description:
    """Return every field, by dotted name, as a value that JSON can hold."""
    modules = {"__main__", *([config.origin.module] if config.origin else [])}
    found: Description = {}
    for leaf in leaves(type(config)):
        _flatten(found, leaf.name, value_of(config, leaf.name), modules)
    return found


def canonical(value: JSON) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def config_hash(config: Config) -> str:
    """Return the sha256, in hex, of the config's description."""
    return hashlib.sha256(canonical(describe(config)).encode()).hexdigest()


def _flatten(found: Description, key: str, value: Any, modules: set[str]) -> None:
    """Put a value under its key, and what overrides can name inside it under dotted keys of its own."""
    if isinstance(value, functools.partial):
        found[key] = _call(value.func, value.args, {}, modules)
        inside: Mapping[str, Any] = value.keywords
    elif isinstance(value, Mapping) and value and all(isinstance(k, str) and PLAIN_KEY.fullmatch(k) for k in value):
        inside = value
    else:
        found[key] = _plain(value, modules)
        inside = _settings(value)
    for name in sorted(inside):
        _flatten(found, f"{key}.{name}", inside[name], modules)


def _settings(value: Any) -> dict[str, Any]:
    """Return the plain settings and buffers of a Module, such as a loss, whose repr often leaves them out."""
    from torch import nn

    if not isinstance(value, nn.Module):
        return {}
    settings = {k: v for k, v in vars(value).items() if isinstance(v, bool | int | float | str) and k[0] != "_"}
    settings.pop("training", None)
    return settings | dict(value.named_buffers(recurse=False))


def _call(function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any], modules: set[str]) -> str:
    """Return `module.name`, with the arguments in brackets where there are some."""
    texts = [canonical(_plain(argument, modules)) for argument in arguments]
    texts += [f"{name}={canonical(_plain(keywords[name], modules))}" for name in sorted(keywords)]
    name = _qualified(function, modules)
    return f"{name}({', '.join(texts)})" if texts else name


def _qualified(thing: Any, modules: set[str]) -> str:
    """Return the name of a function or class under which it can be imported, the cfg.py's as `cfg.name`."""
    if not hasattr(thing, "__qualname__"):
        return str(_plain(thing, modules))
    thing = getattr(thing, "__func__", thing)
    module = getattr(thing, "__module__", None)
    return f"{'cfg' if module in modules else module}.{thing.__qualname__}" if module else str(thing.__qualname__)


def _plain(value: Any, modules: set[str]) -> JSON:
    """Return a value as JSON can hold it."""
    if isinstance(value, enum.Enum):
        return f"{_qualified(type(value), modules)}.{value.name}"
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | str):
        return int(value) if isinstance(value, int) else str(value)
    if isinstance(value, list | tuple):
        return [_plain(each, modules) for each in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(each, modules) for each in value), key=canonical)
    if isinstance(value, Mapping):
        return {str(_plain(key, modules)): _plain(each, modules) for key, each in value.items()}
    if isinstance(value, functools.partial):
        return _call(value.func, value.args, value.keywords, modules)
    if inspect.isroutine(value) or inspect.isclass(value):
        return _qualified(value, modules)
    return _object(value, modules)


def _object(value: Any, modules: set[str]) -> JSON:
    """Return a number of numpy's, an array's or tensor's hash, a path, or the repr without addresses."""
    import torch

    if isinstance(value, np.generic):
        return _plain(value.item(), modules)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {list(value.shape)} sha256:{hashlib.sha256(data).hexdigest()[:16]}"
    if isinstance(value, np.ndarray):
        return f"numpy.{value.dtype} {list(value.shape)} sha256:{hashlib.sha256(value.tobytes()).hexdigest()[:16]}"
    kind: Any = type(value)
    if kind.__repr__ is object.__repr__:
        return f"{_qualified(type(value), modules)} object"
    return _ADDRESS.sub("", repr(value))
