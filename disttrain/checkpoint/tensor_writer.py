"""Writes tensors into a safetensors file one at a time, and hashes them on the way; `tensor_reader.py` reads them.

*Contract*: any safetensors reader opens the files. The few dtypes that the format lacks (complex128 and other rare
ones) are stored as flat bytes; the manifest holds their dtype and shape. The same tensors give the same bytes.

*Cost*: one copy at a time, of a tensor that is on a device or not contiguous. The safetensors library would hold more
copies, would need a second pass for the hash, and would not report a full disk as an OSError.

*Source*: the format: 8 bytes of header length, a JSON header, the tensors' bytes without holes
(https://github.com/huggingface/safetensors#format).
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from disttrain.checkpoint.state_tree import dtype_name
from disttrain.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The longest header that readers of the format accept."""

WRITE_PIECE_BYTES = 8 * 2**20
WORTH_A_THREAD_BYTES = 2**20
"""A second thread hashes a piece of at least this size, while this thread writes it."""

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
AS_BYTES = {
    dtype_name(dtype): dtype
    for name in ("complex128", "complex32", "float8_e8m0fnu", "float4_e2m1fn_x2")
    if (dtype := getattr(torch, name, None)) is not None
}


class Sink(Protocol):
    """An open file of any kind into which tensors are written."""

    def write(self, data: memoryview, /) -> object: ...


def little_endian_bytes(tensor: Tensor, byteorder: str = sys.byteorder) -> memoryview:
    """Return the tensor's values in row-major order as little-endian bytes; they are copied only if necessary."""
    on_cpu = tensor.detach().cpu().resolve_conj().resolve_neg()
    contiguous = as_copyable(on_cpu).contiguous()
    flat = contiguous.as_strided((contiguous.numel(),), (1,))  # a tensor of at most one element may have odd strides
    raw = flat.view(torch.uint8)
    if byteorder == "big":
        raw = swapped(raw, tensor.dtype)
    return raw.numpy().data


def as_copyable(tensor: Tensor) -> Tensor:
    """Return a view of a CPU tensor that any torch can copy: one-byte numbers as bytes, for 2.9 copies no float4."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def swapped(raw: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bytes of numbers of `dtype`, with the bytes of each number in the opposite order."""
    number_bytes = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    return raw.view(-1, number_bytes).flip(1).reshape(-1)


def check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for a tensor that cannot be written; called before anything is written."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_CODES and dtype_name(tensor.dtype) not in AS_BYTES:
            raise CheckpointError(f"tensor {name} has dtype {tensor.dtype}, which a checkpoint cannot hold; convert it")


def stored_as(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[str, list[int]]:
    """Return the dtype and the shape that the header of a file has for such a tensor."""
    code = DTYPE_CODES.get(dtype)
    return ("U8", [math.prod(shape) * dtype.itemsize]) if code is None else (code, list(shape))


def _header(tensors: Mapping[str, Tensor], order: list[str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        tensor = tensors[name]
        code, shape = stored_as(tensor.dtype, tuple(tensor.shape))
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, start + tensor.nbytes]}
        start += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{len(tensors)} tensors need a header of {len(text)} bytes; at most {MAX_HEADER_BYTES}")
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write `tensors` to the new file `path`, flushed to the disk; return its size in bytes and its sha256."""
    with path.open("xb") as file:
        size, sha256 = send_tensors(file, tensors)
        file.flush()
        os.fsync(file.fileno())
    return size, sha256


def send_tensors(
    file: Sink, tensors: Mapping[str, Tensor], fetch: Callable[[str], Tensor] | None = None
) -> tuple[int, str]:
    """Write `tensors` into an open file of any kind; return the size in bytes and the sha256.

    With `fetch` the tensors give only dtypes and shapes, and `fetch` returns the values of one name after another.
    """
    fetch = fetch or tensors.__getitem__
    # Widest first keeps each tensor aligned to its own item size, as readers that map the file expect.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    digest = hashlib.sha256()
    size = 0
    with ThreadPoolExecutor(1) as beside:  # the thread starts at the first large piece
        header = memoryview(_header(tensors, order))
        for data in chain([header], (little_endian_bytes(fetch(name)) for name in order)):
            for start in range(0, len(data), WRITE_PIECE_BYTES):
                piece = data[start : start + WRITE_PIECE_BYTES]
                if len(piece) < WORTH_A_THREAD_BYTES:
                    digest.update(piece)
                    file.write(piece)
                    continue
                hashed = beside.submit(digest.update, piece)  # neither holds the interpreter's lock
                try:
                    file.write(piece)
                finally:
                    hashed.result()
            size += len(data)
    return size, digest.hexdigest()
