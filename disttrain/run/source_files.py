"""The user's own source files of a launch: the cfg.py as it was run, and the modules that it has imported.

*Contract*: a module is the user's own if it lies below the folder of the cfg.py, or was imported after the cfg.py began
(an editable install elsewhere); the standard library, installed packages and disttrain itself are not. Files are named
as they are kept: `cfg.py`, `modules/nets.py`, `modules/lib/__init__.py`, by the names of the modules. What no import
shows (data files, a notebook's cells, text that was given to `exec`) is not found.

*Cost*: one read of each own file. Content beyond `MAX_FILE_BYTES` a file or `MAX_TOTAL_BYTES` in all, and files that
are no Python source, are known by size and hash alone.
"""

import functools
import hashlib
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from disttrain.config import Origin

MAX_FILE_BYTES = 2**20
MAX_TOTAL_BYTES = 16 * 2**20
MAX_HASHED_BYTES = 64 * 2**20
"""A file that is larger, such as an extension with its debug symbols, is known by its size alone."""
GIT_WITHIN_S = 5.0

_PACKAGE = Path(__file__).parents[1]
_INSTALLED = {"site-packages", "dist-packages"}


class SourceFile(NamedTuple):
    """One own file of a launch."""

    path: str
    size_bytes: int
    sha256: str
    content: bytes | None
    """None if the content is not kept."""


def source_files(origin: Origin) -> dict[str, SourceFile]:
    """Return the own files of a loaded config, by the names under which they are kept."""
    files = {"cfg.py": _file_of(origin.file, origin.text)}
    left_bytes = MAX_TOTAL_BYTES
    for name, path in sorted(set(own_modules(origin))):
        try:
            size_bytes = path.stat().st_size
            data = path.read_bytes() if size_bytes <= MAX_HASHED_BYTES else None
        except OSError:
            continue  # it was removed after it was imported
        file = _file_of(path, data, size_bytes)
        if path.suffix != ".py" or size_bytes > min(MAX_FILE_BYTES, left_bytes):
            file = file._replace(content=None)
        else:
            left_bytes -= size_bytes
        files[name] = file
    return files


def _file_of(path: Path, data: bytes | None, size_bytes: int | None = None) -> SourceFile:
    digest = "" if data is None else hashlib.sha256(data).hexdigest()
    return SourceFile(str(path), len(data or b"") if size_bytes is None else size_bytes, digest, data)


def own_modules(origin: Origin) -> Iterator[tuple[str, Path]]:
    """Yield the name under which each own module is kept, and its file."""
    folder = origin.folder.resolve()
    for name, module in list(sys.modules.items()):
        if name == origin.module or not isinstance(module, ModuleType):
            continue
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or is_installed(name, file):
            continue  # most modules end here, before the file system is asked
        path = _resolved(file)
        if path is None or path == origin.file or is_installed(name, str(path)):
            continue
        if name == "__main__" or name not in origin.modules_before or path.is_relative_to(folder):
            parts = [re.sub(r"\W", "_", part)[:100] or "_" for part in name.split(".")]
            parts += ["__init__"] if path.stem == "__init__" and parts[-1] != "__init__" else []
            suffix = path.suffix if re.fullmatch(r"\.\w+", path.suffix) else ""
            yield f"modules/{'/'.join(parts)}{suffix}", path


def _resolved(file: str) -> Path | None:
    try:
        return Path(file).resolve() if Path(file).is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or a loop of links
        return None


def is_installed(name: str, file: str) -> bool:
    """Return whether a module is part of Python, of an installed package or of disttrain."""
    top = name.partition(".")[0]
    if (top in sys.stdlib_module_names and top != "__main__") or not _INSTALLED.isdisjoint(file.split(os.sep)):
        return True
    return file.startswith(_python_folders())


@functools.cache
def _python_folders() -> tuple[str, ...]:
    """Return the beginnings of the paths of Python's own files, and of disttrain's."""
    folders = [Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "scripts")]
    return tuple(f"{folder}{os.sep}" for folder in (*folders, _PACKAGE))


def package_versions(origin: Origin | None) -> dict[str, str]:
    """Return the versions of Python and of the installed packages that have been imported."""
    own = set() if origin is None else {name.split("/")[1].removesuffix(".py") for name, _ in own_modules(origin)}
    found = {"python": sys.version.split()[0]}
    for name in sorted({name.partition(".")[0] for name in list(sys.modules)} - sys.stdlib_module_names - own):
        version = getattr(sys.modules.get(name), "__version__", None)
        if not isinstance(version, str) and not name.startswith("_"):
            try:
                version = metadata.version(name)
            except Exception:  # noqa: BLE001 - no such package, or one whose metadata is damaged
                continue
        if isinstance(version, str):
            found[name] = str(version)
    return found


class GitState(NamedTuple):
    """The commit of a repository, and whether tracked files in it differ from the commit."""

    commit: str
    dirty: bool

    def __str__(self) -> str:
        return f"{self.commit[:12]}{' with changes' if self.dirty else ''}"


def git_state(folder: Path) -> GitState | None:
    """Return the state of the git repository that a folder lies in; None without git, a repository or a commit."""
    output = _git(folder, "status", "--porcelain=v2", "--branch", "--untracked-files=no")
    if output is None:
        return None
    lines = output.decode(errors="replace").splitlines()
    commit = next((line.split()[2] for line in lines if line.startswith("# branch.oid ")), "(initial)")
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        return None
    return GitState(commit, any(not line.startswith("#") for line in lines))


def git_changes(folder: Path) -> bytes | None:
    """Return the diff of the tracked files of a repository to its commit, as `git apply` takes it.

    None if there is none, if git is slow, and beyond `MAX_FILE_BYTES`.
    """
    options = ["--no-ext-diff", "--no-textconv", "--no-color", "--no-relative", "--src-prefix=a/", "--dst-prefix=b/"]
    diff = _git(folder, "diff", "HEAD", "--binary", *options)
    return diff if diff and len(diff) <= MAX_FILE_BYTES else None


def _git(folder: Path, *command: str) -> bytes | None:
    """Return the output of a git command that changes nothing; None if it fails."""
    words = ["git", "-c", "core.fsmonitor=false", "--no-optional-locks", "-C", str(folder), *command]
    try:
        done = subprocess.run(words, capture_output=True, timeout=GIT_WITHIN_S, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
