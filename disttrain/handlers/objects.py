"""Named objects to their states and back: what `Checkpoint` saves and loads.

*Contract*: objects are given as a dict of names to objects, or to lists and dicts of objects; each has `state_dict`
and `load_state_dict`. Loading changes nothing unless every object has its state.
"""

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from disttrain.checkpoint import committed, load, load_file, load_newest
from disttrain.checkpoint.manifest import MANIFEST
from disttrain.engine import Engine
from disttrain.errors import CheckpointError


def load_objects(to_load: Mapping[str, Any], checkpoint: Mapping[str, Any] | str | Path, strict: bool = True) -> None:
    """Load the objects from a checkpoint: a dict, a file, a checkpoint directory, or a directory of those."""
    if not isinstance(to_load, Mapping):
        raise TypeError(f"expected to_load to be a dict of objects, got {type(to_load).__name__}")
    state = checkpoint if isinstance(checkpoint, Mapping) else _read(checkpoint)
    if not isinstance(state, Mapping):
        raise TypeError(f"expected a checkpoint that is a dict, got {type(state).__name__}")
    if len(to_load) == 1 and not set(to_load) & set(state):
        state = dict.fromkeys(to_load, state)  # a single object's checkpoint is its state, under no name
    if missing := [name for name in to_load if name not in state]:
        raise ValueError(f"{missing[0]!r} from `to_load` is not found in the checkpoint; it holds {list(state)}")
    pairs: list[tuple[Any, Any]] = []
    _pair_up(dict(to_load), state, "to_load", pairs)
    for obj, part in pairs:
        target = bare(obj)
        if isinstance(target, nn.Module):
            target.load_state_dict(part, strict=strict)
        else:
            target.load_state_dict(part)


def bare(obj: Any) -> Any:
    """Return the model inside DataParallel, DistributedDataParallel and torch.compile; anything else as it is."""
    while isinstance(obj, nn.Module):
        if isinstance(obj, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            obj = obj.module
        elif "_orig_mod" in obj._modules:  # torch.compile's, whose class would cost seconds to import
            obj = obj._orig_mod
        else:
            break
    return obj


def map_objects(objects: Any, leaf: Callable[[Any, str], Any], path: str = "to_save") -> Any:
    """Return `objects`, nested dicts and lists, with `leaf(object, path)` in the place of each."""
    if not hasattr(objects, "state_dict"):
        if isinstance(objects, Mapping):
            return {name: map_objects(obj, leaf, f"{path}[{name!r}]") for name, obj in objects.items()}
        if isinstance(objects, (list, tuple)):
            return [map_objects(obj, leaf, f"{path}[{index}]") for index, obj in enumerate(objects)]
    return leaf(objects, path)


def weakly(obj: Any, path: str) -> Any:
    """Check an object; hold an engine weakly, for it holds this handler and would never be freed."""
    if not callable(getattr(obj, "state_dict", None)):
        raise TypeError(f"expected {path} to have a state_dict method, got {type(obj).__name__}")
    return weakref.ref(obj) if isinstance(obj, Engine) else obj


def strongly(obj: Any, path: str) -> Any:
    if isinstance(obj, weakref.ref):
        obj = obj()
        if obj is None:
            raise CheckpointError(f"the engine {path} is gone; keep a reference to it as long as it is to be saved")
    return obj


def _pair_up(objects: Any, state: Any, path: str, pairs: list[tuple[Any, Any]]) -> None:
    """Append (object, its state) for all of them, so that loading begins only if each has one."""
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
    """Read a file, a checkpoint directory, or the newest good one in a directory of those."""
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
