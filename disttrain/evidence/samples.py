"""The hash of one sample of a dataset, which is the same on every rank and in every launch if its content is the same.

*Contract*: tensors, arrays, numbers, texts, bytes, images, dates, and lists, tuples, dicts, sets and dataclasses of
them are hashed to the last bit. Of any other object only the type counts, because its text or its attributes may differ
between processes though it is the same. The orders of sets and dicts do not count. A path of a file counts by its name,
because the data may lie in another folder on another host.
"""

import datetime
import decimal
import enum
import hashlib
import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from torch import Tensor

from disttrain.evidence.hashes import tensor_hashes

_DEEPEST = 20
"""Values that lie deeper count by their type: a container may hold itself."""
_WITH_EXACT_TEXT: tuple[type, ...] = (
    *(bool, int, float, complex, bytes, bytearray, range, slice, type(None), type(Ellipsis)),
    *(datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, np.bool_, np.number),
)


def sample_hash(sample: Any) -> str:
    """Return 16 hex digits that identify the content of a sample."""
    return _digest(_content(sample, 0))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _content(value: Any, depth: int) -> str:
    """Return a text that stands for a value and its type."""
    kind = type(value).__qualname__
    if depth > _DEEPEST:
        return kind
    if isinstance(value, Tensor):
        return f"{kind} {_tensor_content(value)}"
    if isinstance(value, np.ndarray):
        return f"{kind} {_array_content(value, depth)}"
    if isinstance(value, enum.Enum):
        return f"{kind} {value.name}"
    if isinstance(value, str):
        is_path = os.path.isabs(value) and len(value) < 4096 and os.path.exists(value)
        return f"{kind} {os.path.basename(value) if is_path else str(value)!r}"
    if isinstance(value, PurePath):
        return f"path {value.name}"
    if isinstance(value, _WITH_EXACT_TEXT):
        return f"{kind} {value!r}"
    if isinstance(value, Mapping):
        return f"{kind} {sorted(_each([item for pair in value.items() for item in pair], depth, 2))}"
    if isinstance(value, Set):
        return f"{kind} {sorted(_each(value, depth))}"
    if isinstance(value, list | tuple):
        return f"{kind} {_each(value, depth)}"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{kind} {_each([getattr(value, field.name, None) for field in fields(value)], depth)}"
    if hasattr(value, "__array_interface__"):  # an image of Pillow
        return f"{kind} {_array_content(np.asarray(value), depth)}"
    return kind


def _each(values: Iterable[Any], depth: int, at_a_time: int = 1) -> list[str]:
    """Return the digests of the values, or of pairs of them; short ones, because containers lie in containers."""
    contents = [_content(value, depth + 1) for value in values]
    return [_digest("\n".join(contents[i : i + at_a_time])) for i in range(0, len(contents), at_a_time)]


def _tensor_content(tensor: Tensor) -> str:
    shape = f"{tensor.dtype} {tuple(tensor.shape) if not tensor.is_nested else 'nested'}"
    try:
        return f"{shape} {tensor_hashes({'': tensor})['']}"
    except (RuntimeError, NotImplementedError, TypeError):  # a nested or quantized tensor, or one without memory
        return shape


def _array_content(array: "np.ndarray[Any, Any]", depth: int) -> str:
    shape = f"{array.dtype} {array.shape}"
    if array.dtype.kind == "O":
        return f"{shape} {_each(array.ravel().tolist(), depth)}"
    if array.dtype.names is not None:
        return f"{shape} {_each([array[name] for name in array.dtype.names], depth)}"
    if array.dtype.char in "gG":  # a long double has bytes that belong to no value
        return shape
    return f"{shape} {hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()}"
