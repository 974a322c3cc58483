"""Reads token files by position: several files, one after another, as one long row of tokens.

*Contract*: nothing of a raw file is read before a token is asked for, and of a .npy file only its header. A file is
opened at the first token of it that is asked for, in the process that asks; a reader that is sent to another process
takes no open file along. A file must keep the size that it had when the reader was made.

The files are read by `pread` from the page cache, which all processes of a host share, as they share a memory map. They
are not mapped: a file that is cut short under a map ends the process by SIGBUS, where a read is an error with a name.

*Errors*: DataError, in one line, for a file that is missing, is not what its dtype says, or has changed its size.

*Cost*: at the start a `stat` for each file. A read takes O(log files) to find its file, and one `pread` for each file
that it touches. At most `MOST_OPEN` files are open at a time.
"""

import glob
import hashlib
import os
import stat
import weakref
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from disttrain.errors import DataError

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""A path, a pattern with `*`, `?` or `[...]` whose files are taken in sorted order, or several of them."""
IntArray = npt.NDArray[np.int64]
MOST_OPEN = 64


class _TokenFile(NamedTuple):
    """A file of tokens: its path, its size in bytes, the type of a token, and the bytes before the first token."""

    path: str
    size: int
    dtype: "np.dtype[Any]"
    offset: int

    @property
    def num_tokens(self) -> int:
        return (self.size - self.offset) // self.dtype.itemsize


class Piece(NamedTuple):
    """The tokens `start` to `stop` of one file, counted in that file."""

    file: int
    start: int
    stop: int


class TokenReader:
    """The tokens of `paths`, one file after another: `reader.read(start, stop)` are the tokens of these positions.

    A raw file has the integer type `dtype`, after `header_bytes` bytes that are no tokens. A .npy file has its own.
    `len` is the number of tokens.
    """

    def __init__(self, paths: Paths, dtype: npt.DTypeLike | None = None, header_bytes: int = 0) -> None:
        raw = None if dtype is None else _integer(np.dtype(dtype), f"dtype={dtype!r}", ValueError)
        if header_bytes < 0:
            raise ValueError(f"header_bytes={header_bytes}: expected 0 or more bytes before the first token")
        self.files = [_described(path, raw, header_bytes) for path in found_files(paths)]
        self._ends: IntArray = np.cumsum([file.num_tokens for file in self.files], dtype=np.int64)
        _opened.cache_clear()  # a file may have been replaced by another one of its name
        weakref.finalize(self, _opened.cache_clear)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> int:
        """Return the token of one position; IndexError ends an iteration."""
        if not 0 <= position < len(self):
            raise IndexError(f"expected a position in 0..{len(self) - 1}, got {position}")
        return int(self.read(position, position + 1)[0])

    @property
    def fingerprint(self) -> str:
        """The names (without folders), sizes and types of the files, hashed."""
        lines = [f"{os.path.basename(file.path)} {file.size} {file.dtype.str} {file.offset}" for file in self.files]
        return hashlib.blake2b("\n".join(lines).encode(errors="surrogatepass"), digest_size=8).hexdigest()

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Yield the parts of the files that hold the tokens `start` to `stop`, in order."""
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[number]) - self.files[number].num_tokens
            end = min(stop, int(self._ends[number]))
            if start < end:
                yield Piece(number, start - begin, end - begin)
            start, number = end, number + 1

    def read(self, start: int, stop: int) -> IntArray:
        """Return the tokens of the positions `start` to `stop`, `[stop - start]`; both lie in 0..len."""
        parts = [self.read_piece(piece) for piece in self.pieces(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])

    def read_piece(self, piece: Piece) -> IntArray:
        """Return the tokens of a piece, `[piece.stop - piece.start]`."""
        path, size, dtype, offset = self.files[piece.file]
        count = (piece.stop - piece.start) * dtype.itemsize
        data = _opened(path).read(size, offset + piece.start * dtype.itemsize, count)
        return np.frombuffer(data, dtype).astype(np.int64)


class _Opened:
    """An open file, which is closed when nothing uses it any more: another thread may be reading it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, size: int, position: int, count: int) -> bytes:
        """Return `count` bytes from `position` of a file that is to have `size` bytes."""
        present = os.fstat(self._descriptor).st_size
        data = os.pread(self._descriptor, count, position) if present == size else b""
        while 0 < len(data) < count:  # a read may be cut by the system, at 2 GiB and on some network file systems
            more = os.pread(self._descriptor, count - len(data), position + len(data))
            if not more:
                break
            data += more
        if len(data) < count:
            raise DataError(
                f"{self.path}: expected {size} bytes, as when the run began, got {os.fstat(self._descriptor).st_size}; "
                "restore the file, and do not write to a file of tokens while a run uses it"
            )
        return data


@lru_cache(MOST_OPEN)
def _opened(path: str) -> _Opened:
    """Return an open file: all readers of a process together have at most MOST_OPEN."""
    return _Opened(path)


def found_files(paths: Paths) -> list[str]:
    """Return the absolute paths of the files, at least one."""
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found: list[str] = []
    for path in [os.path.expanduser(os.fspath(path)) for path in given]:
        is_pattern = glob.has_magic(path) and not os.path.exists(path)
        matches = sorted(glob.glob(path, recursive=True)) if is_pattern else [path]
        if not matches:
            raise DataError(f"{path}: expected token files of this pattern, got none; give the paths of the files")
        found += map(os.path.abspath, matches)
    if not found:
        raise DataError("expected at least one token file, got an empty list; give the paths of the files")
    return found


def _described(path: str, raw: "np.dtype[Any] | None", header_bytes: int) -> _TokenFile:
    """Return the description of one file, whose type is `raw` unless it is a .npy file."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "something else"
            raise DataError(
                f"{path}: expected a token file, got {kind}; give the path of a file, or a pattern of files"
            )
        size = status.st_size
        if path.endswith(".npy") and (described := _described_npy(path, size, raw)):
            return described
    except OSError as error:
        got = "nothing" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(
            f"{path}: expected a token file, got {got}; give the path of a file that can be read"
        ) from error
    if raw is None:
        what = "a file of numpy.save, got one without its header" if path.endswith(".npy") else "a dtype, got none"
        raise DataError(f"{path}: expected {what}; say how its tokens are stored, for example by dtype='uint16'")
    if size < header_bytes or (size - header_bytes) % raw.itemsize:
        after = f" after header_bytes={header_bytes}" if header_bytes else ""
        raise DataError(
            f"{path}: expected whole tokens of {raw.itemsize} bytes ({raw}){after}, got {size} bytes; "
            "the file was cut short, or its tokens have another dtype"
        )
    return _TokenFile(path, size, raw, header_bytes)


def _described_npy(path: str, size: int, given: "np.dtype[Any] | None") -> _TokenFile | None:
    """Return the description of a file of numpy.save; None if the file is none, whatever it is called."""
    with open(path, "rb") as file:
        if file.read(len(npy.MAGIC_PREFIX)) != npy.MAGIC_PREFIX:
            return None
        file.seek(0)
        try:
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
            shape, _, dtype = read(file)
        except (ValueError, KeyError) as error:
            raise DataError(f"{path}: expected the header of a .npy file, got {error}; write it again") from error
        offset = file.tell()
    _integer(dtype, path, DataError)
    if given is not None and given != dtype:
        raise DataError(f"{path}: expected tokens of dtype={given}, got a .npy file of {dtype}; leave out the dtype")
    if len(shape) != 1:
        raise DataError(f"{path}: expected an array of one dimension, got {shape}; save array.ravel()")
    if size != offset + shape[0] * dtype.itemsize:
        expected = offset + shape[0] * dtype.itemsize
        raise DataError(f"{path}: expected {expected} bytes, got {size}; the file was cut short: write it again")
    return _TokenFile(path, size, dtype, offset)


def _integer(dtype: "np.dtype[Any]", where: str, error: type[Exception]) -> "np.dtype[Any]":
    """Return `dtype` if it is one of integers."""
    if dtype.kind not in "iu":
        raise error(f"{where}: expected tokens of an integer type, such as uint16, got {dtype}")
    return dtype
