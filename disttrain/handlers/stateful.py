"""Turn named objects into their states and back, for `Checkpoint`.

*Contract*: objects are given as a dict from names to objects, or to lists and dicts of objects. Each object has
`state_dict` and `load_state_dict`. Nothing is loaded unless every object has its state in the checkpoint.
"""

import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from disttrain.checkpoint import committed, load, load_file, load_newest
from disttrain.checkpoint.manifest import MANIFEST
from disttrain.engine import Engine
from disttrain.errors import CheckpointError
from disttrain.parallel.optimizer_state import load_optimizer


def load_objects(
    to_load: Mapping[str, Any],
    checkpoint: Mapping[str, Any] | str | Path,
    strict: bool = True,
    allow_missing: bool = False,
) -> None:
    """Load objects from a checkpoint: a dict, a file, a checkpoint directory, or a directory of those.

    Nothing is loaded if one of them is missing, unless `allow_missing`: then such an object stays as it is, and a
    state that no object takes is dropped, each with a warning. `strict` is passed to modules: False lets their keys
    differ.
    """
    if not isinstance(to_load, Mapping):
        raise TypeError(f"expected to_load to be a dict of objects, got {type(to_load).__name__}")
    state = checkpoint if isinstance(checkpoint, Mapping) else _read(checkpoint)
    if not isinstance(state, Mapping):
        raise TypeError(f"expected a checkpoint that is a dict, got {type(state).__name__}")
    if len(to_load) == 1 and not set(to_load) & set(state):
        state = dict.fromkeys(to_load, state)  # the checkpoint of a single object is its state, without a name
    if allow_missing:
        for name in [name for name in to_load if name not in state]:
            warnings.warn(f"the checkpoint holds no {name!r}: it begins anew", UserWarning, stacklevel=2)
        for name in [name for name in state if name not in to_load]:
            warnings.warn(f"the checkpoint holds {name!r}, which no object takes", UserWarning, stacklevel=2)
        to_load = {name: each for name, each in to_load.items() if name in state}
    if missing := [name for name in to_load if name not in state]:
        raise ValueError(f"{missing[0]!r} from `to_load` is not found in the checkpoint; it holds {list(state)}")
    pairs: list[tuple[Any, Any]] = []
    _pair_up(dict(to_load), state, "to_load", pairs)
    for obj, part in pairs:
        target = bare(obj)
        if isinstance(target, nn.Module):
            target.load_state_dict(part, strict=strict)
        elif isinstance(target, Optimizer):
            load_optimizer(target, part)
        else:
            target.load_state_dict(part)


def bare(obj: Any) -> Any:
    """Return the model inside DataParallel, DistributedDataParallel and torch.compile; other objects unchanged."""
    while isinstance(obj, nn.Module):
        if isinstance(obj, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            obj = obj.module
        elif "_orig_mod" in obj._modules:  # torch.compile's class; importing it would cost seconds
            obj = obj._orig_mod
        else:
            break
    return obj


def map_objects(objects: Any, leaf: Callable[[Any, str], Any], path: str = "to_save") -> Any:
    """Return nested dicts and lists of objects with each object replaced by `leaf(object, path)`."""
    if not hasattr(objects, "state_dict"):
        if isinstance(objects, Mapping):
            return {name: map_objects(obj, leaf, f"{path}[{name!r}]") for name, obj in objects.items()}
        if isinstance(objects, (list, tuple)):
            return [map_objects(obj, leaf, f"{path}[{index}]") for index, obj in enumerate(objects)]
    return leaf(objects, path)


def listed(objects: Any) -> list[Any]:
    """Return the objects in nested dicts and lists, those behind weak references too, as one list."""
    found: list[Any] = []
    map_objects(objects, lambda obj, path: found.append(strongly(obj, path)))
    return found


def weakly(obj: Any, path: str) -> Any:
    """Check an object and return it; an engine as a weak reference, because it holds the handler that holds it."""
    if not callable(getattr(obj, "state_dict", None)):
        raise TypeError(f"expected {path} to have a state_dict method, got {type(obj).__name__}")
    return weakref.ref(obj) if isinstance(obj, Engine) else obj


def strongly(obj: Any, path: str) -> Any:
    """Return the object behind a reference that `weakly` returned; CheckpointError if it has been freed."""
    if isinstance(obj, weakref.ref):
        obj = obj()
        if obj is None:
            raise CheckpointError(f"the engine {path} is gone; keep a reference to it as long as it is to be saved")
    return obj


def _pair_up(objects: Any, state: Any, path: str, pairs: list[tuple[Any, Any]]) -> None:
    """Append (object, its state) for all objects, so that loading begins only if each object has a state."""
    if callable(getattr(objects, "load_state_dict", None)):
        pairs.append((objects, state))
    elif isinstance(objects, Mapping):
        for name, obj in objects.items():
            if not isinstance(state, Mapping) or name not in state:
                raise ValueError(f"{path}[{name!r}] is not found in the checkpoint")
            _pair_up(obj, state[name], f"{path}[{name!r}]", pairs)
    elif isinstance(objects, (list, tuple)):
        if not isinstance(state, (list, tuple)) or len(state) != len(objects):
            raise ValueError(f"{path} has {len(objects)} objects, the checkpoint does not have as many")
        for index, (obj, part) in enumerate(zip(objects, state, strict=True)):
            _pair_up(obj, part, f"{path}[{index}]", pairs)
    else:
        raise TypeError(f"expected {path} to have a load_state_dict method, got {type(objects).__name__}")


def _read(path: str | Path) -> Any:
    """Read a file, a checkpoint directory, or the newest good one in a directory of checkpoints."""
    if not isinstance(path, (str, Path)):
        raise TypeError(f"expected a checkpoint that is a dict or a path, got {type(path).__name__}")
    path = Path(path)
    if not path.is_dir():
        return load_file(path)
    if (path / MANIFEST).exists() or not committed(path):
        return load(path).state
    loaded = load_newest(path)
    assert loaded is not None
    return loaded.state
