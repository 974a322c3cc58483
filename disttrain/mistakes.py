"""Tells a mistake of the user's code from a failure that may pass, and finds its file and line.

*Contract*: a mistake comes again at every restart, because a run repeats the same step with the same bits. So a run
that ends by one is not started again. What is a mistake is decided by the exception alone, in every process alike:

- `MISTAKES`, and a plain RuntimeError about tensors (torch's own word for shapes, dtypes and gradients), are mistakes;
- not if the exception, or one from which it came, may pass: of files and networks (OSError), of memory, of torn text
  (UnicodeError, JSONDecodeError), or a RuntimeError that speaks of a device, the memory or a connection;
- of every other exception nothing is known, and a restart may help.
"""

import json
import re
import site
import sysconfig
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

MISTAKES = (
    *(TypeError, ValueError, AttributeError, LookupError, NameError, AssertionError, ImportError),
    *(ArithmeticError, NotImplementedError, RecursionError),
)
LONGEST_QUOTE = 300
_PACKAGE = Path(__file__).parent
_MAY_PASS = (OSError, MemoryError, EOFError, UnicodeError, json.JSONDecodeError, torch.OutOfMemoryError)
_OF_TENSORS = re.compile(r"shape|size|dimension|dtype|scalar type|same device|grad\b|tensor|index", re.IGNORECASE)
_OF_MACHINES = re.compile(  # torch writes CUDA in capitals in failures only: a tensor's device is cuda:0
    r"CUDA|CUDNN|cuDNN|CUBLAS|\bHIP|NCCL|[Gg]loo|\bXLA|nvrtc|[Dd]river|memory\b|alloc|[Cc]onnect|socket|peer|"
    r"[Tt]ime.?out|thread|process|worker|\bfiles?\b|mmap|device-side"
)


def is_mistake(error: BaseException) -> bool:
    """Return True if an exception of the user's code would come again at every restart."""
    if may_pass(error):
        return False
    return isinstance(error, MISTAKES) or (type(error) is RuntimeError and bool(_OF_TENSORS.search(str(error))))


def may_pass(error: BaseException) -> bool:
    """Return True if an exception, or one from which it came, may not come again."""
    return any(
        isinstance(each, _MAY_PASS) or (isinstance(each, RuntimeError) and bool(_OF_MACHINES.search(str(each))))
        for each in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def quoted(error: BaseException) -> str:
    """Return an error as part of a one-line message: its type and its text, which is cut if it is long."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def line_of(error: BaseException) -> str | None:
    """Return the innermost line of the user's own files at which an exception came, as `cfg.py:27 in forward`.

    A program that calls disttrain is not meant, but what disttrain calls.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = [number for number, frame in enumerate(frames) if is_of_disttrain(frame.filename)]
    theirs = [frame for frame in frames[ours[0] if ours else 0 :] if is_of_user(frame.filename)]
    return f"{shown_path(theirs[-1].filename)}:{theirs[-1].lineno} in {theirs[-1].name}" if theirs else None


def placed(error: BaseException) -> str:
    """Return an error as `quoted` does, with its place in the user's files in brackets if it has one."""
    place = line_of(error)
    return quoted(error) + (f" ({place})" if place else "")


def is_of_user(file: str) -> bool:
    """Return True for a file that is not of Python, of an installed package, of torch or of disttrain."""
    return not file.startswith(("<frozen", "<string>", *_library_folders()))


def is_of_disttrain(file: str) -> bool:
    """Return True for a file of this package."""
    return file.startswith(f"{_PACKAGE}/")


def shown_path(file: str) -> str:
    """Return a path relative to the working directory if it lies there."""
    path = Path(file)
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):  # elsewhere, or the working directory is gone
        return file


@cache
def _library_folders() -> tuple[str, ...]:
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {*site.getsitepackages(), site.getusersitepackages(), str(_PACKAGE)}
    paths.add(str(Path(torch.__file__).parent))
    return tuple(f"{path}/" for path in paths if path)
