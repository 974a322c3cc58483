"""The tensors of one checkpoint, whichever files they lie in: whole, or just the part of this rank.

*Contract*: a table of chunks is believed only if the chunks of each tensor that is asked for tile it, without overlap
or gap, and the files hold what the table says; all of that is known before memory is taken.

Resharding is ours and not DCP's: what is stored is cut along one dimension, so a rank's part of it is a matter of
intervals, and DCP's metadata, which is a pickle, is not needed.
"""

from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from disttrain.checkpoint import sharded as dtensors
from disttrain.checkpoint.damage import DamagedError
from disttrain.checkpoint.manifest import MANIFEST, TENSORS, Manifest, part_name
from disttrain.checkpoint.sharded import Sharded, Spec
from disttrain.checkpoint.stored import TensorReader, dtype_of
from disttrain.errors import CheckpointError

MAX_OPEN_FILES = 128


class Chunk(NamedTuple):
    """A part of a tensor in one file, along one dimension."""

    file: str
    dim: int
    start: int
    length: int


class Read(NamedTuple):
    """A box of a chunk, and where it goes."""

    file: str
    at: int
    stored: tuple[int, ...]
    inside: tuple[int, ...]
    dim: int
    begin: int
    length: int


def chunks_of(manifest: Manifest, name: str, shape: tuple[int, ...]) -> list[Chunk]:
    """Return where a tensor of `shape` lies, in order; DamagedError where its chunks do not make it up."""
    if manifest.tensors is None:
        if TENSORS not in manifest.files:
            raise DamagedError(f"{MANIFEST} lists no {TENSORS}")
        return [Chunk(TENSORS, 0, 0, shape[0] if shape else 1)]
    if name not in manifest.tensors:
        raise DamagedError(f"{MANIFEST} does not say where the tensor {name!r} lies")
    where, num_files = manifest.tensors[name], len(manifest.files)
    dim, parts = (0, [[where, 0, shape[0] if shape else 1]]) if isinstance(where, int) else (where.dim, where.chunks)
    if not isinstance(where, int) and dim >= len(shape):
        raise DamagedError(f"{MANIFEST}: {name} is cut along dimension {dim}, but has {len(shape)}")
    if any(not 1 <= number <= num_files for number, _, _ in parts) or len({part[0] for part in parts}) < len(parts):
        raise DamagedError(f"{MANIFEST}: {name} lies in a file twice, or in one that is not among the {num_files}")
    end = 0
    for _, start, length in sorted(parts, key=lambda part: part[1:]):
        if start != end or (length < 1 and not isinstance(where, int)):
            raise DamagedError(f"{MANIFEST}: the chunks of {name} overlap or leave a gap at {end} of dimension {dim}")
        end += length
    if shape and end != shape[dim]:
        raise DamagedError(f"{MANIFEST}: the chunks of {name} end at {end} of dimension {dim}, expected {shape[dim]}")
    return [Chunk(part_name(number, num_files), dim, start, length) for number, start, length in parts]


class StateReader:
    """Fetches tensors from a checkpoint that was verified; a context. A tensor held twice is the same object twice.

    `sharded` says which come as DTensors, of which only this rank's part is read.
    """

    def __init__(self, directory: Path, manifest: Manifest, sharded: Sharded | None = None) -> None:
        self._directory = directory
        self._manifest = manifest
        self._sharded = sharded
        self._files: dict[str, TensorReader] = {}
        self._open: set[str] = set()
        self._read: dict[tuple[str, str, tuple[int, ...], object], Tensor] = {}

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
        """Return tensor `name`, which must have that dtype and shape, as it is wanted at `path` of the state."""
        spec = self._sharded(path, shape) if self._sharded is not None else None
        key = (name, dtype, shape, None if spec is None else (spec[0], tuple(spec[1])))
        if key not in self._read:
            self._read[key] = self._load(name, dtype, shape, spec)
        return self._read[key]

    def read(self, name: str, dtype: str, shape: tuple[int, ...], into: Tensor) -> Tensor:
        """Read a whole tensor into memory that is there."""
        for read in self._reads(name, dtype, shape, shape, (0,) * len(shape)):
            self._do(read, into)
        return into

    def _load(self, name: str, dtype: str, shape: tuple[int, ...], spec: Spec | None) -> Tensor:
        sizes, offsets = (shape, (0,) * len(shape)) if spec is None else dtensors.part_of(spec, shape)
        reads = self._reads(name, dtype, shape, sizes, offsets)
        # Only now, when files are known to hold at least as much, is memory taken.
        try:
            made = torch.empty(sizes, dtype=dtype_of(dtype))
        except RuntimeError as error:  # such as 0 x 2^62 x 2^62, or no memory left
            raise CheckpointError(f"cannot hold {name}, {dtype} of shape {list(shape)}: {error}") from error
        for read in reads:
            self._do(read, made)
        return made if spec is None else dtensors.from_part(made, spec, shape)

    def _reads(
        self, name: str, dtype: str, shape: tuple[int, ...], sizes: tuple[int, ...], offsets: tuple[int, ...]
    ) -> list[Read]:
        """Return what is to be read for the box of `sizes` at `offsets` of a tensor."""
        reads = []
        for chunk in chunks_of(self._manifest, name, shape):
            dim = chunk.dim
            stored = (*shape[:dim], chunk.length, *shape[dim + 1 :]) if shape else ()
            first, last = (offsets[dim], offsets[dim] + sizes[dim]) if shape else (0, 1)
            start, end = max(first, chunk.start), min(last, chunk.start + chunk.length)
            if start < end or sizes == shape:
                at = self._file(chunk.file).find(name, dtype, stored)
                inside = (*offsets[:dim], start - chunk.start, *offsets[dim + 1 :]) if shape else ()
                reads.append(Read(chunk.file, at, stored, inside, dim, start - first, end - start))
        return reads

    def _do(self, read: Read, into: Tensor) -> None:
        target = into.narrow(read.dim, read.begin, read.length) if into.ndim else into
        self._file(read.file).read(read.at, read.stored, read.inside, target)

    def _file(self, name: str) -> TensorReader:
        if name not in self._files:
            self._files[name] = TensorReader(self._directory / name)
        if name not in self._open and len(self._open) >= MAX_OPEN_FILES:
            self._close()
        self._open.add(name)
        return self._files[name]
