"""Windows that hold several documents, with everything that keeps the documents apart.

The documents lie in the files one after another. A window is cut from them as by `TokenFiles`, so it may begin and end
inside a document. With 0 as the token that ends a document, and `-` for a target that does not count:

    tokens     5 6 0 7 8 9 0 4
    targets    6 0 - 8 9 0 - 3
    documents  0 0 0 1 1 1 1 2
    positions  0 1 2 0 1 2 3 0

*Contract*: with `document_mask`, the positions and these targets, a document has in a packed window the losses that it
has alone. The part of a document that a window begins inside counts as a document that begins there.

*Errors*, *Cost*: those of `TokenReader`. With `starts` a window takes O(log documents) reads of 8 bytes in addition.
"""

import operator
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from disttrain.data.token_files import TokenFiles
from disttrain.data.token_reader import IntArray, Paths, Piece, TokenReader, found_files
from disttrain.errors import DataError

IGNORED = -100
"""The target that torch's cross entropy leaves out by default."""


class PackedTokens(TokenFiles):
    """The windows of `TokenFiles` as dicts of "tokens", "targets", "documents" and "positions", int64 `[length]` each.

    One of these says where documents begin:

    - `end`, the token that ends each document, such as 50256 of GPT-2: a document begins after it;
    - `begin`, the token that begins each document;
    - `starts`, an index file for each token file: the positions in that token file at which documents begin, ascending
      (.npy, or raw int64). Each file begins a document, whether its index says so or not.

    "documents" numbers the documents of a window from 0. "positions" counts from 0 at the start of each. A target that
    belongs to another document than its token is `IGNORED`.
    """

    def __init__(
        self,
        paths: Paths,
        length: int,
        *,
        end: int | None = None,
        begin: int | None = None,
        starts: Paths | None = None,
        dtype: npt.DTypeLike | None = None,
        header_bytes: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__(paths, length, dtype=dtype, header_bytes=header_bytes, vocab_size=vocab_size)
        borders = {"end": end, "begin": begin, "starts": starts}
        given = [name for name, value in borders.items() if value is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(f"expected one of end, begin and starts, which say where documents begin, got {got}")
        self.end, self.begin = (_fitting(name, borders[name], self) for name in ("end", "begin"))
        self.indexes = None if starts is None else _indexes(starts, self.reader)

    @property
    def fingerprint(self) -> str:
        """A text that identifies the files, the windows and the documents; it reads nothing."""
        indexes = [index.fingerprint for index in self.indexes or ()]
        return f"{super().fingerprint} end {self.end} begin {self.begin} starts {indexes}"

    def __getitem__(self, index: int) -> dict[str, Tensor]:  # type: ignore[override]  # a dict in place of a pair
        window = self.window(index)
        begins = self._begins(index % len(self) * self.length, window)
        begins[0] = True
        places = np.arange(self.length)
        sample = {
            "tokens": window[:-1],
            "targets": np.where(begins[1:], IGNORED, window[1:]),
            "documents": np.cumsum(begins[:-1]) - 1,
            "positions": places - np.maximum.accumulate(np.where(begins[:-1], places, 0)),
        }
        return {name: torch.from_numpy(array) for name, array in sample.items()}

    def _begins(self, start: int, window: IntArray) -> "npt.NDArray[np.bool_]":
        """Return for each token of a window whether a document begins with it, `[length + 1]`."""
        if self.begin is not None:
            return np.equal(window, self.begin)
        begins = np.zeros(len(window), dtype=np.bool_)
        if self.indexes is None:
            begins[1:] = window[:-1] == self.end
            return begins
        at = 0
        for piece in self.reader.pieces(start, start + len(window)):
            begins[at] = piece.start == 0
            begins[at + _starts_in(self.indexes[piece.file], piece)] = True
            at += piece.stop - piece.start
        return begins


def document_mask(documents: Tensor) -> Tensor:
    """Return the attention mask of packed windows, for the `attn_mask` of torch's scaled_dot_product_attention.

    `documents` `[..., length]` numbers the document of each token. The mask is bool, `[..., 1, length, length]`, the
    same for all heads. It is True where the query (the last axis but one) sees the key (the last axis): the key belongs
    to the same document and is not after the query. It takes length ** 2 bytes for each window, on the device of
    `documents`.
    """
    same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
    return same.tril().unsqueeze(-3)


def num_targets(batch: Mapping[str, Tensor]) -> int:
    """Return the number of targets of a batch that count, for the `weight` of a Config."""
    return int((batch["targets"] != IGNORED).sum())


def _fitting(name: str, token: Any, dataset: TokenFiles) -> int | None:
    """Return the token of a border, if every file can hold it."""
    if token is None:
        return None
    for file in dataset.reader.files:
        limits = np.iinfo(file.dtype)
        if not limits.min <= operator.index(token) <= limits.max:
            raise ValueError(f"{name}={token}: expected a token that {file.path} can hold, as {file.dtype}")
    if dataset.vocab_size is not None and not 0 <= token < dataset.vocab_size:
        raise ValueError(f"{name}={token}: expected a token in 0..{dataset.vocab_size - 1}, because of vocab_size")
    return operator.index(token)


def _indexes(starts: Paths, tokens: TokenReader) -> list[TokenReader]:
    """Return the readers of the index files, one for each token file."""
    paths = found_files(starts)
    if len(paths) != len(tokens.files):
        raise ValueError(
            f"starts: expected an index file for each of the {len(tokens.files)} token files, got {len(paths)}"
        )
    return [TokenReader(path, None if path.endswith(".npy") else np.int64) for path in paths]


def _starts_in(index: TokenReader, piece: Piece) -> IntArray:
    """Return the starts of documents inside a piece, counted from its start."""
    first = bisect_left(index, piece.start)
    starts = index.read(first, bisect_left(index, piece.stop, first)) - piece.start
    if len(starts) and (starts[0] < 0 or starts[-1] >= piece.stop - piece.start or (np.diff(starts) < 0).any()):
        raise DataError(
            f"{index.files[0].path}: expected ascending positions, got {starts + piece.start} between the tokens "
            f"{piece.start} and {piece.stop}; sort the index"
        )
    return starts
