"""Windows of token files as a dataset: sample i is the i-th window of all tokens in a row.

Two files of 7 and 4 tokens, in windows of 3. Each window has one token more than its inputs, the last target, which is
the first input of the next window:

    file 0: 0 1 2 3 4 5 6   file 1: 7 8 9 10
    window 0:  tokens 0 1 2   targets 1 2 3
    window 1:  tokens 3 4 5   targets 4 5 6
    window 2:  tokens 6 7 8   targets 7 8 9

*Contract*: a window is a function of its number and of the files. Its identity is that of the files: their names, sizes
and types, in their order, and `length`.

*Errors*, *Cost*: those of `TokenReader`. The dataset takes some 100 bytes for each file, whatever its size.
"""

import operator

import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from disttrain.data.token_reader import IntArray, Paths, TokenReader
from disttrain.errors import DataError


class TokenFiles(Dataset[tuple[Tensor, Tensor]]):
    """The windows of `length` tokens of the files `paths`; sample i is `(tokens, targets)`, int64 `[length]` each.

    `paths` is a path, a pattern such as "data/train-*.bin", or a list of them. A raw file needs the `dtype` of its
    tokens, and `header_bytes` if it begins with something else; a .npy file has its own. `vocab_size`, if it is given,
    is compared with the tokens of each window. The tokens after the last whole window are left out.
    *Errors*: DataError for files without a whole window, and for a token outside 0..vocab_size-1; see `TokenReader`.
    """

    def __init__(
        self,
        paths: Paths,
        length: int,
        *,
        dtype: npt.DTypeLike | None = None,
        header_bytes: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self.length = operator.index(length)
        if self.length < 1:
            raise ValueError(f"length={length}: expected a window of at least 1 token")
        self.vocab_size = vocab_size
        self.reader = TokenReader(paths, dtype, header_bytes)
        if len(self) < 1:
            files = f"{len(self.reader.files)} file{'s' if len(self.reader.files) > 1 else ''}"
            raise DataError(
                f"{self.reader.files[0].path}: expected at least length + 1 = {self.length + 1} tokens, "
                f"got {len(self.reader)} in {files}; use shorter windows or more text"
            )

    def __len__(self) -> int:
        """Return the number of whole windows, each with the target of its last token."""
        return (len(self.reader) - 1) // self.length

    @property
    def fingerprint(self) -> str:
        """A text that identifies the files and the windows; it reads nothing."""
        return f"{self.reader.fingerprint} length {self.length}"

    def window(self, index: int) -> IntArray:
        """Return the tokens of window `index` and the last target, `[length + 1]`."""
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"expected a window below {len(self)}, got {number}")
        start = number % len(self) * self.length
        window = self.reader.read(start, start + self.length + 1)
        if self.vocab_size is not None and (window.min() < 0 or window.max() >= self.vocab_size):
            self._refuse_token(start, window, self.vocab_size)
        return window

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = torch.from_numpy(self.window(index))
        return window[:-1], window[1:]

    def _refuse_token(self, start: int, window: IntArray, vocab_size: int) -> None:
        at = int(((window < 0) | (window >= vocab_size)).argmax())
        (piece,) = self.reader.pieces(start + at, start + at + 1)
        file = self.reader.files[piece.file]
        raise DataError(
            f"{file.path}: expected tokens in 0..{vocab_size - 1}, got {window[at]} at position {piece.start}; "
            f"compare the tokenizer, and the type of the file with dtype={file.dtype}"
        )
