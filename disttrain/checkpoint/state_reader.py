"""Reads the tensors of one checkpoint from all its files: whole, or only the part of this rank.

*Contract*: a tensor is read only if its chunks in the table tile it, without overlap or gap, and if the files hold the
tensors that the table lists. Both are checked before memory is taken.

This module reshards by itself, without torch.distributed.checkpoint (DCP). A stored tensor is cut along one dimension,
so a rank's part of it follows from intervals. The metadata of DCP, which is a pickle, is not needed.
"""

from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from disttrain.checkpoint import dtensors
from disttrain.checkpoint.dtensors import DTensorPlan, MeshPlacements
from disttrain.checkpoint.manifest import MANIFEST, TENSORS, Manifest, part_name
from disttrain.checkpoint.tensor_reader import TensorReader, dtype_of
from disttrain.errors import CheckpointError, DamagedError

MAX_OPEN_FILES = 128


class Chunk(NamedTuple):
    """The piece of a tensor that one file holds, along one dimension."""

    file: str
    dim: int
    start: int
    length: int


class BoxRead(NamedTuple):
    """A box to read from one chunk, and its place in the result."""

    file: str
    position: int
    """The position of the chunk in the file, in bytes."""
    chunk_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    """The offsets of the box in the chunk."""
    dim: int
    begin: int
    length: int
    """The place of the box in the result: from `begin`, along `dim`."""


def chunks_of(manifest: Manifest, name: str, shape: tuple[int, ...]) -> list[Chunk]:
    """Return the chunks of a tensor of `shape`; DamagedError if they do not tile it."""
    if manifest.tensors is None:
        if TENSORS not in manifest.files:
            raise DamagedError(f"{MANIFEST} lists no {TENSORS}")
        return [Chunk(TENSORS, 0, 0, shape[0] if shape else 1)]
    if name not in manifest.tensors:
        raise DamagedError(f"{MANIFEST} lists no file for the tensor {name!r}")
    entry, num_files = manifest.tensors[name], len(manifest.files)
    is_whole = isinstance(entry, int)
    dim, chunks = (0, [[entry, 0, shape[0] if shape else 1]]) if isinstance(entry, int) else (entry.dim, entry.chunks)
    if not is_whole and dim >= len(shape):
        raise DamagedError(f"{MANIFEST}: {name} is cut along dimension {dim}, but has {len(shape)}")
    numbers = [number for number, _, _ in chunks]
    if any(not 1 <= number <= num_files for number in numbers) or len(set(numbers)) < len(numbers):
        raise DamagedError(
            f"{MANIFEST}: {name} has two chunks in one file, or one in a file that is not among the {num_files}"
        )
    end = 0
    for _, start, length in sorted(chunks, key=lambda chunk: chunk[1:]):
        if start != end or (length < 1 and not is_whole):
            raise DamagedError(f"{MANIFEST}: the chunks of {name} overlap or leave a gap at {end} of dimension {dim}")
        end += length
    if shape and end != shape[dim]:
        raise DamagedError(f"{MANIFEST}: the chunks of {name} end at {end} of dimension {dim}, expected {shape[dim]}")
    return [Chunk(part_name(number, num_files), dim, start, length) for number, start, length in chunks]


class StateReader:
    """Reads tensors from a verified checkpoint; a context. A tensor with two paths is the same object under both.

    `sharded` returns the mesh and the placements of a tensor that is to be a DTensor. Only this rank's part of it is
    read.
    """

    def __init__(self, directory: Path, manifest: Manifest, sharded: DTensorPlan | None = None) -> None:
        self._directory = directory
        self._manifest = manifest
        self._sharded = sharded
        self._files: dict[str, TensorReader] = {}
        self._open: set[str] = set()
        self._loaded: dict[tuple[str, str, tuple[int, ...], object], Tensor] = {}

    def __enter__(self) -> "StateReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for reader in self._files.values():
            reader.close()
        self._open.clear()

    def fetch(self, name: str, dtype: str, shape: tuple[int, ...], path: str = "") -> Tensor:
        """Return tensor `name`, which must have that dtype and shape; a DTensor if `sharded` returns one for `path`."""
        spread = self._sharded(path, shape) if self._sharded is not None else None
        key = (name, dtype, shape, None if spread is None else (spread[0], tuple(spread[1])))
        if key not in self._loaded:
            self._loaded[key] = self._load(name, dtype, shape, spread)
        return self._loaded[key]

    def read(self, name: str, dtype: str, shape: tuple[int, ...], into: Tensor) -> Tensor:
        """Read a whole tensor into `into`, and return it."""
        for read in self._plan_reads(name, dtype, shape, shape, (0,) * len(shape)):
            self._read_box(read, into)
        return into

    def _load(self, name: str, dtype: str, shape: tuple[int, ...], spread: MeshPlacements | None) -> Tensor:
        sizes, offsets = (shape, (0,) * len(shape)) if spread is None else dtensors.local_box(spread, shape)
        reads = self._plan_reads(name, dtype, shape, sizes, offsets)
        # Memory is taken only now, when the files are known to hold at least as much.
        try:
            values = torch.empty(sizes, dtype=dtype_of(dtype))
        except RuntimeError as error:  # such as 0 x 2^62 x 2^62, or no memory left
            raise CheckpointError(f"cannot hold {name}, {dtype} of shape {list(shape)}: {error}") from error
        for read in reads:
            self._read_box(read, values)
        return values if spread is None else dtensors.dtensor_from_local(values, spread, shape)

    def _plan_reads(
        self, name: str, dtype: str, shape: tuple[int, ...], sizes: tuple[int, ...], offsets: tuple[int, ...]
    ) -> list[BoxRead]:
        """Return the reads that fill the box of `sizes` at `offsets` of a tensor."""
        reads = []
        for chunk in chunks_of(self._manifest, name, shape):
            dim = chunk.dim
            chunk_shape = (*shape[:dim], chunk.length, *shape[dim + 1 :]) if shape else ()
            first, last = (offsets[dim], offsets[dim] + sizes[dim]) if shape else (0, 1)
            start, end = max(first, chunk.start), min(last, chunk.start + chunk.length)
            if start < end or sizes == shape:
                position = self._reader(chunk.file).find(name, dtype, chunk_shape)
                inside = (*offsets[:dim], start - chunk.start, *offsets[dim + 1 :]) if shape else ()
                reads.append(BoxRead(chunk.file, position, chunk_shape, inside, dim, start - first, end - start))
        return reads

    def _read_box(self, read: BoxRead, into: Tensor) -> None:
        target = into.narrow(read.dim, read.begin, read.length) if into.ndim else into
        self._reader(read.file).read(read.position, read.chunk_shape, read.offsets, target)

    def _reader(self, name: str) -> TensorReader:
        """Return the reader of a file; close all others if too many are open."""
        if name not in self._files:
            self._files[name] = TensorReader(self._directory / name)
        if name not in self._open and len(self._open) >= MAX_OPEN_FILES:
            self._close()
        self._open.add(name)
        return self._files[name]
