"""Converts nested state to a JSON tree and tensors under dotted names, and back; a reader need not trust either.

*Contract*: `restore_state` of a flattened state gives it back with the same types: int keys, tuples, big ints, nan and
infinities included. Plain values are written as they are. A value that JSON lacks is an object with one `$` key:

| value                                | JSON                                                             |
|--------------------------------------|------------------------------------------------------------------|
| int beyond 64 bits                   | `{"$int": "0x1f..."}`                                            |
| nan, inf, -inf                       | `{"$float": "nan"}`                                              |
| tuple, torch.Size                    | `{"$tuple": [...]}`, `{"$size": [...]}`                          |
| dict with int keys or with `$` names | `{"$dict": [[key, value], ...]}`                                 |
| OrderedDict, Counter                 | `{"$ordered": a dict, "$metadata": of a state_dict}`, `{"$counter": a dict}` |
| tensor                               | `{"$tensor": "model.0.weight", "dtype": "float32", "shape": [3, 4]}` |
| numpy scalar                         | `{"$numpy": "float64", "value": 0.5}`                            |
| numpy array                          | `{"$array": a tensor}`                                           |

*Errors*: a value of any other type is a CheckpointError that names its path, before anything is written. Subclasses
(enums, named tuples) are other types: they would come back as their base class. Of numpy's scalars and arrays those of
the dtypes in `NUMPY_DTYPES` can be held.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from disttrain.checkpoint import dtensors
from disttrain.errors import CheckpointError, DamagedError

Json = Any
"""A value that `json.loads` can return."""

NUMPY_DTYPES = frozenset(
    ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"]
)
"""The dtypes of numpy whose scalars and arrays a checkpoint can hold: those that torch has too."""

MAX_STATE_DEPTH = 64
"""The deepest nesting of a state; a deeper state most likely contains itself."""

_PLAIN_INTS = range(-(2**63), 2**63)
_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_CAN_HOLD = (
    "None, bool, int, float, str, list, tuple, dict with str or int keys, a tensor, or a number or array of numpy"
)

OnTensor = Callable[[Tensor, str, str], Json]
"""(tensor, dotted name, path for messages) -> the value in its place in the tree."""


@dataclass(frozen=True)
class Flat:
    """A flattened state: its tree, and its tensors by name. Some tensors may be DTensors."""

    tree: Json
    tensors: dict[str, Tensor]


def flatten(state: Any) -> Flat:
    """Flatten `state`; nothing is copied. A tensor that occurs twice is held once."""
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}

    def hold(tensor: Tensor, name: str, path: str) -> Json:
        tensor = dtensors.check_dtensor(tensor, path) if dtensors.is_dtensor(tensor) else dense(tensor, path)
        identity = _identity(tensor)
        if tensor.numel() == 0 or identity not in names:
            names[identity] = name = _unused_name(name, tensors)
            tensors[name] = tensor
        else:
            name = names[identity]
        return {"$tensor": name, "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape)}

    return Flat(encode_state(state, hold), tensors)


def check_plain(state: Any) -> int:
    """Return the bytes of the tensors; CheckpointError for a value that is neither a tensor nor a plain value."""
    num_bytes = 0

    def count(tensor: Tensor, name: str, path: str) -> Json:
        nonlocal num_bytes
        num_bytes += dense(tensor, path).nbytes

    encode_state(state, count, numpy=False)  # torch.load(weights_only=True) reads none
    return num_bytes


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def dense(tensor: Tensor, path: str) -> Tensor:
    """Return a plain dense tensor without its graph; CheckpointError that names `path` for any other tensor."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise CheckpointError(f"{path} is a {type_name(tensor)}; expected a plain tensor: gather or convert it first")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise CheckpointError(f"{path} is a sparse or quantized tensor; expected a dense one: use .to_dense()")
    if tensor.is_meta:
        raise CheckpointError(f"{path} is a tensor on the meta device, without values; materialize the model first")
    return tensor.detach()


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that two tensors share only if they are the same numbers in the same memory."""
    if dtensors.is_dtensor(tensor):
        return dtensors.dtensor_identity(tensor)
    if tensor.data_ptr() == 0:  # a device without addresses, such as XLA's: each tensor gets a new key
        return (object(),)
    memory = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return (*memory, tensor.is_conj(), tensor.is_neg())


def _unused_name(name: str, taken: Mapping[str, Any]) -> str:
    """Return `name`, with a number added if another path flattens to the same name or if the format reserves it."""
    name = name.encode(errors="backslashreplace").decode() or "tensor"
    candidate, number = name, 1
    while candidate in taken or candidate == "__metadata__":
        number += 1
        candidate = f"{name}#{number}"
    return candidate


def encode_state(
    value: Any, on_tensor: OnTensor, name: str = "", path: str = "state", depth: int = 0, *, numpy: bool = True
) -> Json:
    """Return the JSON tree of `value`, with the result of `on_tensor` in the place of each tensor.

    `numpy=False` refuses numpy's numbers and arrays.
    """
    if depth > MAX_STATE_DEPTH:
        raise CheckpointError(f"{path} is nested deeper than {MAX_STATE_DEPTH} levels; does the state contain itself?")
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
        return encode_state(item, on_tensor, join_path(name, key), f"{path}[{key!r}]", depth + 1, numpy=numpy)

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
            # The state_dict of a module has the version of each submodule there; torch.save keeps it too.
            return {"$ordered": tree, "$metadata": inside("_metadata", metadata)}
        return tree if kind is dict else {"$ordered" if kind is OrderedDict else "$counter": tree}
    if numpy and isinstance(value, np.generic) and value.dtype.name in NUMPY_DTYPES:
        return {"$numpy": value.dtype.name, "value": inside("value", value.item())}
    if numpy and kind is np.ndarray and value.dtype.name in NUMPY_DTYPES and value.dtype.isnative:
        # A copy only where torch cannot share the memory: it takes nothing read-only, and strides of whole items only.
        shareable = value.flags.writeable and all(step >= 0 and step % value.itemsize == 0 for step in value.strides)
        return {"$array": on_tensor(torch.from_numpy(value if shareable else value.copy()), name, path)}
    hint = "; convert it with .item()" if kind.__module__ == "numpy" and hasattr(value, "item") else ""
    raise CheckpointError(f"{path} is a {type_name(value)}, which a checkpoint cannot hold; expected {_CAN_HOLD}{hint}")


def type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


Fetch = Callable[[str, str, tuple[int, ...], str], Tensor]
"""(name, dtype, shape, dotted path in the state) -> that tensor; DamagedError if there is no such tensor."""


def restore_state(tree: Json, fetch: Fetch, depth: int = 0, path: str = "") -> Any:
    """Return the state of a tree that `flatten` made, with tensors from `fetch`; DamagedError for any other tree."""
    if depth > 3 * MAX_STATE_DEPTH:
        raise DamagedError(f"the state is nested deeper than {MAX_STATE_DEPTH} levels")
    if isinstance(tree, list):
        return [restore_state(item, fetch, depth + 1, join_path(path, index)) for index, item in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    if not any(key.startswith("$") for key in tree):
        return {key: restore_state(item, fetch, depth + 1, join_path(path, key)) for key, item in tree.items()}
    return _restore_tagged(tree, fetch, depth + 1, path)


def join_path(path: str, key: str | int) -> str:
    """Return the dotted path of the value under `key`."""
    return f"{path}.{key}" if path else str(key)


def _restore_tagged(tree: dict[str, Json], fetch: Fetch, depth: int, path: str) -> Any:
    """Restore an object with a `$` key: the table in this module's docstring, read from right to left."""
    match tree:
        case {"$tensor": str(name), "dtype": str(dtype), "shape": list(shape), **rest} if not rest:
            if all(type(size) is int and 0 <= size < 2**63 for size in shape):
                return fetch(name, dtype, tuple(shape), path)
        case {"$numpy": str(name), "value": value, **rest} if not rest and name in NUMPY_DTYPES:
            return _numpy_number(name, restore_state(value, fetch, depth, path))
        case {"$array": {"$tensor": _, "dtype": str(name)} as inner, **rest} if not rest and name in NUMPY_DTYPES:
            tensor = restore_state(inner, fetch, depth, path)
            return tensor if tensor.is_meta else tensor.numpy()  # an export describes tensors before it reads them
        case {"$int": str(text), **rest} if not rest:
            try:
                return int(text, 16)
            except ValueError as error:
                raise DamagedError(f"the state holds {text[:40]!r} where a hexadecimal number belongs") from error
        case {"$float": ("nan" | "inf" | "-inf") as text, **rest} if not rest:
            return _FLOATS[text]
        case {"$tuple": list(items), **rest} if not rest:
            return tuple(restore_state(items, fetch, depth, path))
        case {"$size": list(items), **rest} if not rest:
            if all(type(size) is int and size >= 0 for size in items):
                if any(size not in _PLAIN_INTS for size in items):
                    raise DamagedError("the state holds a size beyond what a tensor can have")
                return torch.Size(items)
        case {"$dict": list(pairs), **rest} if not rest:
            return {key: restore_state(item, fetch, depth, join_path(path, key)) for key, item in _pairs(pairs)}
        case {"$counter": dict(inner), **rest} if not rest:
            return Counter(_restore_dict(inner, fetch, depth, path))
        case {"$ordered": dict(inner), **rest} if set(rest) <= {"$metadata"}:
            ordered = OrderedDict(_restore_dict(inner, fetch, depth, path))
            if rest:
                metadata = restore_state(rest["$metadata"], fetch, depth, join_path(path, "_metadata"))
                ordered._metadata = metadata  # type: ignore[attr-defined]
            return ordered
    raise DamagedError(f"the state holds an object with the keys {sorted(tree)}; no release writes such an object")


def _numpy_number(name: str, number: Any) -> Any:
    """Return a number as numpy's type `name`; DamagedError unless it is what `item()` of that type returns."""
    kind: Any = np.dtype(name).type
    try:
        if type(number) is type(kind().item()):
            return kind(number)
    except OverflowError:
        pass
    raise DamagedError(f"the state holds {str(number)[:40]!r} where a {name} belongs")


def _restore_dict(tree: Json, fetch: Fetch, depth: int, path: str) -> dict[Any, Any]:
    value = restore_state(tree, fetch, depth, path)
    if type(value) is not dict:
        raise DamagedError(f"the state holds a {type(value).__name__} where a dict belongs")
    return value


def _pairs(pairs: list[Json]) -> Iterator[tuple[str | int, Json]]:
    for pair in pairs:
        match pair:
            case [str(key) | int(key), item] if type(key) is not bool:
                yield key, item
            case _:
                raise DamagedError("the state holds a dict entry that is not a pair of a str or int key and a value")
