"""Small files that a crash never leaves half-written, files of JSON lines that a resumed run continues, short paths.

*Contract*: `write_text` replaces a file in one step; a reader sees the old text or the new one. `JsonLines` appends; a
kill may cut its last line short, and opening the file again removes that line. `read_json` reads a small file that may
be damaged, or written by a stranger: whatever is wrong with it is one ValueError.
"""

import json
import math
import multiprocessing.util
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

_LONGEST_FOLDER = 60
"""The most bytes of a temporary folder in which sockets have room: a socket's path has at most 103 on every system."""


def keep_socket_paths_short() -> None:
    """Let multiprocessing keep its sockets in a short folder if TMPDIR is long; children of this process do too.

    Call it before processes are started or send tensors. Nothing else leaves TMPDIR.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_FOLDER:
        return
    short = next((f for f in ("/tmp", "/var/tmp", "/dev/shm") if os.access(f, os.W_OK | os.X_OK)), None)
    before, tempfile.tempdir = tempfile.tempdir, short
    try:
        multiprocessing.util.get_temp_dir()  # it keeps the folder that it makes first
    finally:
        tempfile.tempdir = before


def count_bytes(number: int) -> str:
    """Return a size as text, such as "3.4 MB"."""
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def write_text(path: Path, text: str | bytes) -> None:
    """Write `text` to the file `path`, flushed to the disk, by one rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(text.encode() if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def printable(text: str) -> str:
    """Return text of an unknown writer with its control characters escaped, so that no terminal acts on them."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def json_text(value: Any, indent: int | None = None) -> str:
    """Return `value` as strict JSON, which every reader accepts: NaN and the infinities become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


MAX_JSON_BYTES = 16 * 2**20
"""The largest small file that `read_json` reads into memory."""
MAX_DEPTH = 50
"""Values that lie deeper in each other are refused, because code that walks them would exceed Python's limit."""


def read_json(path: Path) -> Any:
    """Return the value in a small JSON file.

    *Errors*: OSError if the file cannot be read, ValueError for anything but strict JSON of bounded size and depth.
    """
    with path.open("rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"it is larger than {MAX_JSON_BYTES} bytes")
    try:
        value = json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=_finite_float)
    except RecursionError:
        raise ValueError("its values lie too deep in each other") from None
    layer = [value]
    for _ in range(MAX_DEPTH):
        layer = [part for outer in layer for part in _parts_of(outer)]
        if not layer:
            return value
    raise ValueError("its values lie too deep in each other")


def _parts_of(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


class JsonLines:
    """A file of one JSON object a line, each with its `step`, in order, which a resumed run continues.

    Opening the file at a step removes the lines of later steps: a killed run wrote them, and the resumed run writes
    them again. No step gets a second line.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.last: dict[str, Any] = {}
        """The last line; empty if there is none."""
        self._last_step = -1
        end, last_line = 0, b"\n"
        with path.open("ab+") as file:
            file.seek(0)
            for line in file:
                try:
                    written = json.loads(line)
                    written_step = written["step"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    break  # a kill cut this line short; the lines after it may be incomplete too
                if type(written_step) is not int or written_step > step:
                    break
                self._last_step, end, last_line, self.last = written_step, end + len(line), line, written
            file.truncate(end)
            if not last_line.endswith(b"\n"):
                file.write(b"\n")
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, *lines: dict[str, Any]) -> None:
        """Append the lines of new steps: other processes see them at once; `sync` makes them survive a power loss."""
        for line in lines:
            if line["step"] > self._last_step:
                self._last_step, self.last = line["step"], line
                self._file.write(json_text(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush the written lines to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
