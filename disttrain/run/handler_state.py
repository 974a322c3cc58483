"""State that a config's handlers hold and that no checkpoint holds.

A handler that averages weights or counts something has state of its own. It survives a kill only if `run.keep` saves
it. Two checks find what was forgotten:

- `unkept_objects`: before the first step, objects with `state_dict` and `load_state_dict` that a handler reaches;
- `unkept_values`: tensors, arrays and numbers that a handler reaches, for `disttrain verify`, which compares them at
  the end of an undisturbed and of a killed run.

*Contract*: a handler reaches what its closure, its bound object, its arguments and the globals that its code names
hold, directly or in attributes, lists, tuples, sets and dicts. What a checkpoint holds, and what the run itself
consists of, is left out. Nothing is changed, and no property is read.
"""

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from disttrain.run.state import Run

FOLLOWED_DEPTH = 8
"""Attributes and containers are followed this deep."""
MAX_VALUES = 10_000
"""So many values are read; a handler that reaches more holds data, not state."""

_PLAIN = (bool, int, float, complex, str, bytes, np.generic)
_OPAQUE = (types.ModuleType, type, types.BuiltinFunctionType, types.CodeType, types.FrameType, types.GeneratorType)
_OF_LIBRARIES = (
    *("disttrain.", "torch.", "numpy.", "rich."),
    *("builtins.", "logging.", "pathlib.", "threading.", "_io.", "_thread."),
)
"""Modules whose objects are not followed into their attributes."""


def unkept_objects(handlers: Iterable[tuple[str, Any]], run: Run) -> dict[str, Any]:
    """Return by path the objects with a state that `handlers`, by name, reach and no checkpoint holds."""
    return {path: value for path, value in _reached(handlers, run) if _has_state(value)}


def unkept_values(handlers: Iterable[tuple[str, Any]], run: Run) -> dict[str, Any]:
    """Return by path the tensors, arrays, numbers and texts that `handlers` reach and no checkpoint holds."""
    reached = list(_reached(handlers, run))
    if len(reached) >= MAX_VALUES:
        return {}
    return {path: value for path, value in reached if isinstance(value, (Tensor, np.ndarray, *_PLAIN))}


def _has_state(value: Any) -> bool:
    """Return whether an object has the two methods, and a state that is not empty."""
    try:
        if not all(callable(getattr(value, method, None)) for method in ("state_dict", "load_state_dict")):
            return False
    except Exception:  # noqa: BLE001 - a proxy whose __getattr__ raises
        return False
    try:
        return bool(value.state_dict())
    except Exception:  # noqa: BLE001 - a state that cannot be had now is one that nobody saves
        return True


def _known(run: Run) -> dict[int, Any]:
    """Return the objects, by id, that belong to the run or to its checkpoints."""
    parts: list[Any] = [run, run.config, run.backend, run.directory, run.layout, run.slots, run.precision, run.loader]
    parts += [run.trainer, run.trainer.state, run.evaluation, run.updates, run.gradients, run.slot_results]
    parts += [run.best, run.early_stop, run.bad_steps, run.evaluated]
    parts += [run.optimizer, run.optimizer.state, run.schedule, run.data, run.kept, *run.kept.values()]
    parts += [*run.optimizers.values(), *getattr(run.schedule, "by_name", {}).values()]
    modules = [run.step_function, *(kept for kept in run.kept.values() if isinstance(kept, nn.Module))]
    for module in modules:
        parts += [*module.modules(), *module.parameters(), *module.buffers()]
    return {id(part): part for part in parts}


def _reached(handlers: Iterable[tuple[str, Any]], run: Run) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) for everything that the handlers reach, each object once."""
    known = _known(run)
    seen: dict[int, Any] = {}  # the objects themselves, so that no id is used again meanwhile
    pending = [(name, handler, 0) for name, handler in reversed(list(handlers))]
    count = 0
    while pending and count < MAX_VALUES:
        path, value, depth = pending.pop()
        if value is None or id(value) in known or isinstance(value, _OPAQUE):
            continue
        plain = isinstance(value, _PLAIN)
        if not plain:
            if id(value) in seen:
                continue
            seen[id(value)] = value
        count += 1
        yield path, value
        if not plain and depth < FOLLOWED_DEPTH:
            inside = _first_inside(path, value, MAX_VALUES - count)
            pending += [(below, inner, depth + 1) for below, inner in reversed(inside)]


def _first_inside(path: str, value: Any, num: int) -> list[tuple[str, Any]]:
    """Return the first `num` (path, value) that one object holds; none if it cannot be looked into now."""
    try:
        return list(islice(_inside(path, value), num))
    except Exception:  # noqa: BLE001 - the user's own code: a state_dict, or a dict that reads its values
        return []


def _inside(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) for what one object holds."""
    if isinstance(value, Tensor | np.ndarray):
        return
    if isinstance(value, partial):
        yield path, value.func
        yield from ((f"{path}({index})", item) for index, item in enumerate(value.args))
        yield from ((f"{path}({key})", item) for key, item in value.keywords.items())
    elif isinstance(value, types.MethodType):
        yield path, value.__self__
    elif isinstance(value, types.FunctionType):
        yield from _of_function(path, value)
    elif isinstance(value, Mapping):
        yield from ((f"{path}[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, nn.Module | Optimizer):
        yield from ((f"{path}.{name}", item) for name, item in value.state_dict().items())
    elif hasattr(type(value), "popleft"):  # a deque
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif not f"{type(value).__module__}.".startswith(_OF_LIBRARIES):
        yield from ((f"{path}.{name}", item) for name, item in getattr(value, "__dict__", {}).items())


def _of_function(path: str, function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) for the variables of its closure, its defaults and the globals that its code names."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{path}.{name}", cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
    yield from ((f"{path}({index})", item) for index, item in enumerate(function.__defaults__ or ()))
    for name in code.co_names:
        value = function.__globals__.get(name)
        if name in function.__globals__ and not isinstance(value, types.FunctionType):
            yield f"{path}.{name}", value
