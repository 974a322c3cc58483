"""Nested state as two things that no reader has to trust: a JSON tree, and tensors under dotted names.

*Contract*: `restore(flatten(state))` gives `state` back with the same types: int keys, tuples, big ints, nan and
infinities included. Plain values stand for themselves; what JSON lacks is an object with one `$` key:

| value                                | JSON                                                             |
|--------------------------------------|------------------------------------------------------------------|
| int beyond 64 bits                   | `{"$int": "0x1f..."}`                                            |
| nan, inf, -inf                       | `{"$float": "nan"}`                                              |
| tuple, torch.Size                    | `{"$tuple": [...]}`, `{"$size": [...]}`                          |
| dict with int keys or with `$` names | `{"$dict": [[key, value], ...]}`                                 |
| OrderedDict, Counter                 | `{"$ordered": a dict, "$metadata": of a state_dict}`, `{"$counter": a dict}` |
| tensor                               | `{"$tensor": "model.0.weight", "dtype": "float32", "shape": [3, 4]}` |

*Errors*: a value of any other type is a CheckpointError that names its path, before anything is written.
Subclasses (`numpy.float64`, enums, named tuples) are other types: they would not come back as what they were.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.checkpoint import sharded
from disttrain.checkpoint.damage import DamagedError
from disttrain.errors import CheckpointError

Json = Any
"""What `json.loads` can return."""

MAX_DEPTH = 64
"""Deepest nesting of a state; what is deeper is most likely a value that contains itself."""

_PLAIN_INTS = range(-(2**63), 2**63)
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_CAN_HOLD = "None, bool, int, float, str, list, tuple, dict with str or int keys, or a tensor"

OnTensor = Callable[[Tensor, str, str], Json]
"""(tensor, dotted name, path for messages) -> what stands for it in the tree."""


@dataclass(frozen=True)
class Flat:
    """A state taken apart: its tree and its tensors, by name, of which some may be DTensors."""

    tree: Json
    tensors: dict[str, Tensor]


def flatten(state: Any) -> Flat:
    """Take `state` apart; nothing is copied. A tensor that occurs twice is held once."""
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}

    def hold(tensor: Tensor, name: str, path: str) -> Json:
        tensor = sharded.checked(tensor, path) if sharded.is_sharded(tensor) else dense(tensor, path)
        identity = _identity(tensor)
        if tensor.numel() == 0 or identity not in names:
            names[identity] = name = _unused(name, tensors)
            tensors[name] = tensor
        else:
            name = names[identity]
        return {"$tensor": name, "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}

    return Flat(encode(state, hold), tensors)


def check_plain(state: Any) -> int:
    """Refuse a state that holds anything but tensors and plain values; return the bytes of its tensors."""
    num_bytes = 0

    def count(tensor: Tensor, name: str, path: str) -> Json:
        nonlocal num_bytes
        num_bytes += dense(tensor, path).nbytes

    encode(state, count)
    return num_bytes


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def dense(tensor: Tensor, path: str) -> Tensor:
    """Return a plain dense tensor without its graph, or refuse it with a CheckpointError that names `path`."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise CheckpointError(f"{path} is a {type_name(tensor)}; expected a plain tensor: gather or convert it first")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(f"{path} is a sparse or quantized tensor; expected a dense one: use .to_dense()")
    if tensor.is_meta:
        raise CheckpointError(f"{path} is a tensor on the meta device, without values; materialize the model first")
    return tensor.detach()


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors have in common only if they are the same numbers at the same place."""
    if sharded.is_sharded(tensor):
        return sharded.identity(tensor)
    if tensor.data_ptr() == 0:  # a device that gives no addresses, such as XLA's: each counts as another
        return (object(),)
    place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return (*place, tensor.is_conj(), tensor.is_neg())


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    """Return `name`, or with a number where another path flattens to the same name or the format owns it."""
    name = name.encode(errors="backslashreplace").decode() or "tensor"
    candidate, number = name, 1
    while candidate in taken or candidate == "__metadata__":
        number += 1
        candidate = f"{name}#{number}"
    return candidate


def encode(value: Any, on_tensor: OnTensor, name: str = "", path: str = "state", depth: int = 0) -> Json:
    """Return the JSON tree of `value`, with `on_tensor`'s answer in the place of each tensor."""
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{path} is nested deeper than {MAX_DEPTH} levels; does the state contain itself?")
    if isinstance(value, Tensor):
        return on_tensor(value, name, path)
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if value in _PLAIN_INTS else {"$int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}

    def inside(key: Any, item: Any) -> Json:
        return encode(item, on_tensor, below(name, key), f"{path}[{key!r}]", depth + 1)

    if kind in (list, tuple, torch.Size):
        items = [inside(index, item) for index, item in enumerate(value)]
        return items if kind is list else {"$tuple" if kind is tuple else "$size": items}
    if kind in (dict, OrderedDict, Counter):
        for key in value:
            if type(key) not in (str, int):
                raise CheckpointError(f"{path} has the key {key!r} of type {type_name(key)}; expected str or int")
        pairs = [[key, inside(key, item)] for key, item in value.items()]
        simple = all(type(key) is str and not key.startswith("$") for key in value)
        tree: Json = dict(pairs) if simple else {"$dict": pairs}
        if kind is OrderedDict and (metadata := getattr(value, "_metadata", None)) is not None:
            # A module's state_dict carries the version of each submodule there; torch.save keeps it too.
            return {"$ordered": tree, "$metadata": inside("_metadata", metadata)}
        return tree if kind is dict else {"$ordered" if kind is OrderedDict else "$counter": tree}
    hint = "; convert it with .item()" if kind.__module__ == "numpy" and hasattr(value, "item") else ""
    raise CheckpointError(f"{path} is a {type_name(value)}, which a checkpoint cannot hold; expected {_CAN_HOLD}{hint}")


def type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


Fetch = Callable[[str, str, tuple[int, ...], str], Tensor]
"""(name, dtype, shape, dotted path in the state) -> that tensor, or DamagedError if there is none such."""


def restore(tree: Json, fetch: Fetch, depth: int = 0, path: str = "") -> Any:
    """Put together the state that `flatten` took apart, with `fetch`'s tensors; DamagedError for any other tree."""
    if depth > 3 * MAX_DEPTH:
        raise DamagedError(f"the state is nested deeper than {MAX_DEPTH} levels")
    if isinstance(tree, list):
        return [restore(item, fetch, depth + 1, below(path, index)) for index, item in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    if not any(key.startswith("$") for key in tree):
        return {key: restore(item, fetch, depth + 1, below(path, key)) for key, item in tree.items()}
    return _restore_tagged(tree, fetch, depth + 1, path)


def below(path: str, key: str | int) -> str:
    """Return the dotted path of what lies under `key`."""
    return f"{path}.{key}" if path else str(key)


def _restore_tagged(tree: dict[str, Json], fetch: Fetch, depth: int, path: str) -> Any:
    """Restore an object with a `$` key: the table in this module's docstring, read from right to left."""
    match tree:
        case {"$tensor": str(name), "dtype": str(dtype), "shape": list(shape), **rest} if not rest:
            if all(type(size) is int and 0 <= size < 2**63 for size in shape):
                return fetch(name, dtype, tuple(shape), path)
        case {"$int": str(text), **rest} if not rest:
            try:
                return int(text, 16)
            except ValueError as error:
                raise DamagedError(f"the state holds {text[:40]!r} where a hexadecimal number belongs") from error
        case {"$float": ("nan" | "inf" | "-inf") as text, **rest} if not rest:
            return _FLOATS[text]
        case {"$tuple": list(items), **rest} if not rest:
            return tuple(restore(items, fetch, depth, path))
        case {"$size": list(items), **rest} if not rest:
            if all(type(size) is int and size >= 0 for size in items):
                if any(size not in _PLAIN_INTS for size in items):
                    raise DamagedError("the state holds a size beyond what a tensor can have")
                return torch.Size(items)
        case {"$dict": list(pairs), **rest} if not rest:
            return {key: restore(item, fetch, depth, below(path, key)) for key, item in _pairs(pairs)}
        case {"$counter": dict(inner), **rest} if not rest:
            return Counter(_restore_dict(inner, fetch, depth, path))
        case {"$ordered": dict(inner), **rest} if set(rest) <= {"$metadata"}:
            ordered = OrderedDict(_restore_dict(inner, fetch, depth, path))
            if rest:
                metadata = restore(rest["$metadata"], fetch, depth, below(path, "_metadata"))
                ordered._metadata = metadata  # type: ignore[attr-defined]
            return ordered
    raise DamagedError(f"the state holds an object with the keys {sorted(tree)}, which no release writes so")


def _restore_dict(tree: Json, fetch: Fetch, depth: int, path: str) -> dict[Any, Any]:
    value = restore(tree, fetch, depth, path)
    if type(value) is not dict:
        raise DamagedError(f"the state holds a {type(value).__name__} where a dict belongs")
    return value


def _pairs(pairs: list[Json]) -> Iterator[tuple[str | int, Json]]:
    for pair in pairs:
        match pair:
            case [str(key) | int(key), item] if type(key) is not bool:
                yield key, item
            case _:
                raise DamagedError("the state holds a dict entry that is no pair of a str or int key and a value")
