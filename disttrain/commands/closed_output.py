"""Lets a run go on when nobody reads its output any more: `disttrain launch cfg.py | head -n 1`, or a lost terminal.

*Contract*: inside the context, what cannot be written to stdout or stderr is dropped, in this process and in what it
starts afterwards. The run's files (ledger, curves, logs) hold everything that matters.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class _Dropping:
    """A stream that drops everything once a write has failed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def writelines(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.write(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Point the descriptor at nothing, so that the stream's rest and other writers of it meet no error either."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def output_may_close() -> Iterator[None]:
    """Drop what cannot be printed; a stream that was closed before the start (`>&-`) counts too."""
    before: dict[str, Any] = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in before.items():
        setattr(sys, name, _nothing() if stream is None else _Dropping(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


def _nothing() -> TextIO:
    """Return a stream that drops everything. Its descriptor, mostly that of the closed stream, is passed on."""
    stream = open(os.devnull, "w")  # noqa: SIM115
    os.set_inheritable(stream.fileno(), True)
    return stream
