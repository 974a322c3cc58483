"""Reads one safetensors file: checks its header, and reads any box of any tensor straight into its memory.

*Contract*: the whole header is checked before it is used. Each tensor has a known dtype, its bytes fill its shape, and
all tensors together fill the file without holes or overlaps. Nothing is mapped into memory, so a file that vanishes or
is cut off while it is read is an error, and not a signal.

*Cost*: one piece of bounded size, beside the memory that is read into.
"""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disttrain.checkpoint.check import cannot_read, reading
from disttrain.checkpoint.state_tree import dtype_name
from disttrain.checkpoint.tensor_writer import (
    AS_BYTES,
    DTYPE_CODES,
    MAX_HEADER_BYTES,
    WRITE_PIECE_BYTES,
    stored_as,
    swapped,
)
from disttrain.errors import DamagedError

_ITEM_BYTES = {code: dtype.itemsize for dtype, code in DTYPE_CODES.items()}
_DTYPES: dict[str, torch.dtype] = {dtype_name(dtype): dtype for dtype in DTYPE_CODES} | AS_BYTES


class StoredTensor(NamedTuple):
    """The entry of a header for one tensor; `start` counts from the beginning of the file."""

    code: str
    shape: list[int]
    start: int


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a name such as "float32"; DamagedError if no checkpoint holds it."""
    if name not in _DTYPES:
        raise DamagedError(f"the state holds a tensor of dtype {name[:40]!r}, which no release writes")
    return _DTYPES[name]


class TensorReader:
    """The tensors of one safetensors file; a context."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path
        self._descriptor: int | None = None
        with reading(path) as file:
            self._entries = _read_header(path.name, os.fstat(file.fileno()).st_size, file.read)

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def fetch(self, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
        """Return tensor `name`, which must have that dtype and shape."""
        start = self.find(name, dtype, shape)
        values = torch.empty(shape, dtype=dtype_of(dtype))
        self.read(start, shape, [0] * len(shape), values)
        return values

    def described(self) -> dict[str, Tensor]:
        """Return every tensor of the file, by name, without its values, with the dtype that the file says."""
        dtypes = {code: dtype for dtype, code in DTYPE_CODES.items()}
        return {name: torch.empty(e.shape, dtype=dtypes[e.code], device="meta") for name, e in self._entries.items()}

    def find(self, name: str, dtype: str, shape: tuple[int, ...]) -> int:
        """Return the position at which tensor `name` begins; DamagedError if there is no such tensor."""
        if name not in self._entries:
            raise DamagedError(f"{self.name} holds no tensor {name!r}")
        entry = self._entries[name]
        torch_dtype = dtype_of(dtype)
        code, stored_shape = stored_as(torch_dtype, shape)
        if torch_dtype not in DTYPE_CODES and entry.code == "U8" and entry.shape != stored_shape:
            raise DamagedError(f"{self.name}: {name} holds too few or too many bytes for {dtype} {list(shape)}")
        if (entry.code, entry.shape) != (code, stored_shape):
            got = f"{entry.code} of shape {entry.shape}"
            raise DamagedError(f"{self.name}: {name} should be {dtype} of shape {list(shape)}, got {got}")
        return entry.start

    def read(self, start: int, shape: Sequence[int], offsets: Sequence[int], into: Tensor) -> None:
        """Fill `into` with the box at `offsets` of the tensor that begins at `start` and has `shape`."""
        if into.numel() == 0:
            return
        row_bytes = math.prod(shape[1:]) * into.itemsize
        begin = start + (offsets[0] * row_bytes if offsets else 0)
        has_whole_rows = list(into.shape[1:]) == list(shape[1:])
        if has_whole_rows and into.is_contiguous():
            self._fill(begin, into)
        elif row_bytes <= WRITE_PIECE_BYTES:
            num_rows = WRITE_PIECE_BYTES // row_bytes
            for first in range(0, into.shape[0], num_rows):
                target = into[first : first + num_rows]
                rows = torch.empty([target.shape[0], *shape[1:]], dtype=into.dtype)
                self._fill(begin + first * row_bytes, rows)
                for dim in range(1, rows.ndim):
                    rows = rows.narrow(dim, offsets[dim], target.shape[dim])
                _copy_bits(target, rows)
        else:
            for index in range(into.shape[0]):
                self.read(begin + index * row_bytes, shape[1:], offsets[1:], into[index])

    def _fill(self, position: int, into: Tensor) -> None:
        """Fill `into`, which is contiguous, with the bytes at `position`."""
        raw = into.as_strided((into.numel(),), (1,), into.storage_offset()).view(torch.uint8)
        memory = raw.numpy().data
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW)
            while memory:
                count = os.preadv(self._descriptor, [memory], position)
                if count == 0:
                    raise DamagedError(f"{self.name} was cut off while it was read")
                memory, position = memory[count:], position + count
        except OSError as error:
            raise cannot_read(self._path, error) from error
        if sys.byteorder == "big":
            raw.copy_(swapped(raw, into.dtype))


def _copy_bits(into: Tensor, values: Tensor) -> None:
    """Copy values of the same dtype and shape, even of a dtype for which torch has no copy."""
    if into.dtype.itemsize == 1:
        into, values = into.view(torch.uint8), values.view(torch.uint8)
    into.copy_(values)


def _read_header(name: str, size: int, read: Any) -> dict[str, StoredTensor]:
    """Return the entry of each tensor in the header; DamagedError if the file does not match its header."""
    length = int.from_bytes(read(8), "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise DamagedError(f"{name} is not a safetensors file: its header has {length} bytes, the file {size}")
    try:
        header = json.loads(read(length).decode())
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name} is not a safetensors file: its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise DamagedError(f"{name} is not a safetensors file: its header is not an object")
    header.pop("__metadata__", None)
    entries: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int]] = []
    for key, value in header.items():
        entry, end = _parse_entry(name, key, value, length + 8)
        entries[key] = entry
        spans.append((entry.start, end))
    last = length + 8
    for start, end in sorted(spans):
        if start != last:
            raise DamagedError(f"{name} is not a safetensors file: its tensors overlap or leave holes at byte {last}")
        last = end
    if last != size:
        raise DamagedError(f"{name} is not a safetensors file: its tensors end at byte {last} of {size}")
    return entries


def _parse_entry(name: str, key: str, value: Any, base: int) -> tuple[StoredTensor, int]:
    match value:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            numbers = [*shape, start, end]
            if code not in _ITEM_BYTES:
                raise DamagedError(f"{name} holds {key[:200]!r} as {code[:40]!r}, which no release writes")
            are_sizes = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
            if are_sizes and end - start == math.prod(shape) * _ITEM_BYTES[code]:
                return StoredTensor(code, shape, base + start), base + end
    raise DamagedError(f"{name} is not a safetensors file: its header's {key[:200]!r} does not describe a tensor")
