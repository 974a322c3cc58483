"""The names in a directory of checkpoints on a local or shared file system, and durable operations on its files.

*Contract*: a name gives the state of a checkpoint, and changes only by one rename:

| name                              | meaning                                                                    |
|-----------------------------------|----------------------------------------------------------------------------|
| `.tmp-00000040-1f2e3d4c`          | a save under way, or cut off: never read, removed at the next start        |
| `step-00000040`                   | committed: complete and durable                                            |
| `step-00000040.replaced-1f2e3d4c` | committed, and being replaced by another checkpoint of the same step       |
| `.del-00000040-1f2e3d4c`          | a removal under way, or cut off: never read, removed at the next start     |
| `damaged-00000040-1f2e3d4c`       | damaged, set aside for a person to inspect: never read, never removed      |

Everything else in the directory is left alone.
"""

import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from disttrain.errors import CheckpointError

logger = logging.getLogger(__name__)

_COMMITTED = re.compile(r"step-([0-9]{8,15})(\.replaced-[0-9a-f]{8})?")
_LEFTOVER = re.compile(r"\.(?:tmp|del)-[0-9]{8,15}-[0-9a-f]{8}")
_DAMAGED = re.compile(r"damaged-[0-9]{8,15}-[0-9a-f]{8}")
_NOTE = re.compile(r"note-([0-9]{1,9})\.json")
_STEP = re.compile(r"-([0-9]{8,15})")


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint of `step`: "step-00000040"."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a committed checkpoint's name; None for any other name."""
    match = _COMMITTED.fullmatch(name)
    if match is None or f"{int(match[1]):08d}" != match[1]:
        return None
    return int(match[1])


def unique_name(kind: str, step: int) -> str:
    """Return a new name of a kind such as ".tmp", ".del" or "damaged"."""
    return f"{kind}-{step:08d}-{secrets.token_hex(4)}"


def replaced_name(name: str) -> str:
    """Return the name under which a committed checkpoint stays readable while another takes its name."""
    return f"{name}.replaced-{secrets.token_hex(4)}"


def note_name(number: int) -> str:
    """Return the name of the note that rank `number` leaves beside its part."""
    return f"note-{number}.json"


def note_number(name: str) -> int | None:
    """Return the number of the rank that left a note; None for a file that is not a note."""
    match = _NOTE.fullmatch(name)
    return None if match is None else int(match[1])


def _folders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return [entry.name for entry in entries if entry.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"cannot list the checkpoints in {root}: {error.strerror}; check its permissions"
        ) from error


def committed(root: Path) -> list[str]:
    """Return the names of the committed checkpoints, newest first; none if there is no such directory."""
    steps = {name: step for name in _folders(root) if (step := step_of(name)) is not None}
    return sorted(steps, key=lambda name: (steps[name], name == checkpoint_name(steps[name])), reverse=True)


def set_aside(root: Path) -> list[str]:
    """Return the names of the damaged checkpoints that were set aside."""
    return sorted(name for name in _folders(root) if _DAMAGED.fullmatch(name))


def leftovers(root: Path) -> list[str]:
    """Return the names of saves and removals that are under way or were cut off."""
    return sorted(name for name in _folders(root) if _LEFTOVER.fullmatch(name))


def step_in(name: str) -> int:
    """Return the step in a name of any kind that the table above lists."""
    match = _STEP.search(name)
    return int(match[1]) if match else 0


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot flush a directory, such as CIFS
            raise
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents, durably."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file, flushed to the disk; the caller makes its name durable."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def discard(root: Path, name: str, step: int) -> None:
    """Remove a checkpoint: first its name, by one rename, then its files. A failure is only logged."""
    doomed = root / unique_name(".del", step)
    try:
        (root / name).rename(doomed)
        shutil.rmtree(doomed)
    except FileNotFoundError:
        logger.debug("%s had been removed already", root / name)
    except OSError as error:
        logger.warning("cannot remove the old checkpoint %s: %s; remove it by hand", root / name, error)


def clean(root: Path) -> list[str]:
    """Remove the saves and removals that a kill cut off; return their names.

    Only one process may call this, before the first save of a run.
    """
    removed = []
    names = _folders(root)
    for name in names:
        step = step_of(name)
        is_replaced = step is not None and name != checkpoint_name(step) and checkpoint_name(step) in names
        if not (is_replaced or _LEFTOVER.fullmatch(name)) or (root / name).is_symlink():
            continue
        try:
            shutil.rmtree(root / name)
            removed.append(name)
        except OSError as error:
            logger.warning("cannot remove the leftover %s: %s; remove it by hand", root / name, error)
    return removed


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file; it replaces `path`, whole and durable, if the body ends without an error."""
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def cannot_write(path: Path, error: Exception, needed_bytes: int) -> CheckpointError:
    """Return the error for a failed save: the path, the reason, the needed and the free bytes, and the remedy."""
    folder = path
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free_bytes = shutil.disk_usage(folder).free
    reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
    return CheckpointError(
        f"cannot write the checkpoint {path}: {reason}; it needs {needed_bytes} bytes and {free_bytes} are free there. "
        "Free some space, keep fewer checkpoints or choose another directory; the checkpoints already there are intact"
    )
