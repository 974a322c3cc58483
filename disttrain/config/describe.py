"""Describes a Config by plain values: the same config has the same text on every rank, process and machine.

*Contract*: `describe` returns one flat dict, from dotted names to JSON values.

- A function is described by its qualified name. The module of the cfg.py is always called `cfg`.
- A keyword of a partial has a dotted name of its own, the one that overrides use: `optimizer.lr`.
- An object is described by its repr without addresses, a tensor by its hash.

The body of a function is not read: if only the body changes, the description stays the same.
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

from disttrain.config.annotations import PLAIN_KEY, leaves, value_of
from disttrain.config.declaration import Declaration
from disttrain.config.fields import Config

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
Description: TypeAlias = dict[str, JSON]

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def describe(config: Config) -> Description:
    """Return every field, by dotted name, as a value that JSON can hold."""
    modules = {"__main__", *([config.origin.module] if config.origin else [])}
    description: Description = {}
    for leaf in leaves(type(config)):
        _flatten(description, leaf.name, value_of(config, leaf.name), modules)
    return description


def canonical(value: JSON) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def config_hash(config: Config) -> str:
    """Return the sha256, in hex, of the config's description."""
    return hashlib.sha256(canonical(describe(config)).encode()).hexdigest()


def _flatten(description: Description, key: str, value: Any, modules: set[str]) -> None:
    """Add a value under its key, and each part of it that has a name of its own under a dotted key."""
    if isinstance(value, functools.partial):
        description[key] = _call(value.func, value.args, {}, modules)
        parts: Mapping[str, Any] = value.keywords
    elif isinstance(value, Mapping) and value and all(isinstance(k, str) and PLAIN_KEY.fullmatch(k) for k in value):
        parts = value
    elif isinstance(value, Declaration):
        parts = dict(value)
    else:
        description[key] = _plain(value, modules)
        parts = _settings(value)
    for name in sorted(parts):
        _flatten(description, f"{key}.{name}", parts[name], modules)


def _settings(value: Any) -> dict[str, Any]:
    """Return the plain settings and buffers of a Module such as a loss; its repr often omits them."""
    from torch import nn

    if not isinstance(value, nn.Module):
        return {}
    settings = {k: v for k, v in vars(value).items() if isinstance(v, bool | int | float | str) and k[0] != "_"}
    settings.pop("training", None)
    return settings | dict(value.named_buffers(recurse=False))


def _call(function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any], modules: set[str]) -> str:
    """Return `module.name`, followed by the arguments in brackets if there are any."""
    texts = [canonical(_plain(argument, modules)) for argument in arguments]
    texts += [f"{name}={canonical(_plain(keywords[name], modules))}" for name in sorted(keywords)]
    name = _qualified(function, modules)
    return f"{name}({', '.join(texts)})" if texts else name


def _qualified(function: Any, modules: set[str]) -> str:
    """Return the name by which a function or class is imported; for one of the cfg.py it is `cfg.name`."""
    if not hasattr(function, "__qualname__"):
        return str(_plain(function, modules))
    function = getattr(function, "__func__", function)
    module, name = getattr(function, "__module__", None), str(function.__qualname__)
    return f"{'cfg' if module in modules else module}.{name}" if module else name


def _plain(value: Any, modules: set[str]) -> JSON:
    """Return a value in a form that JSON can hold."""
    if isinstance(value, enum.Enum):
        return f"{_qualified(type(value), modules)}.{value.name}"
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | str):
        return int(value) if isinstance(value, int) else str(value)
    if isinstance(value, list | tuple):
        return [_plain(item, modules) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item, modules) for item in value), key=canonical)
    if isinstance(value, Mapping):
        return {str(_plain(key, modules)): _plain(item, modules) for key, item in value.items()}
    if isinstance(value, functools.partial):
        return _call(value.func, value.args, value.keywords, modules)
    if inspect.isroutine(value) or inspect.isclass(value):
        return _qualified(value, modules)
    return _object(value, modules)


def _object(value: Any, modules: set[str]) -> JSON:
    """Return the value of a numpy number, the text of a path, the hash of an array or tensor, or else the repr."""
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
