"""The launches that a run directory keeps: for each its cfg.py, own modules, command, versions and git commit.

*Contract*: `launches/0001/` and so on hold `launch.json`, the files that it lists and, if tracked files differ from the
git commit, `changes.diff`. A folder is made in one step, by
rank 0, which holds the run directory. It never changes. A launch whose files, versions, command and commit are those of
the newest one, such as a restart of killed ranks, adds none. A run that an older release began gets its first folder
from the cfg.py that it kept. The folders may be a stranger's: a damaged one counts as absent, and names in it lead to
nowhere outside it.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError

from disttrain.checkpoint.storage import fsync_directory, write_file
from disttrain.files import json_text, read_json
from disttrain.run.source_files import MAX_FILE_BYTES, GitState, SourceFile

logger = logging.getLogger(__name__)

LAUNCH_JSON, CHANGES = "launch.json", "changes.diff"
KeptName = Annotated[str, StringConstraints(pattern=r"^(cfg\.py|modules(/\w+)+(\.\w+)?)$")]
"""The name of a kept file; it cannot leave its folder."""


class KeptFile(BaseModel):
    """One own file of a launch, as `launch.json` lists it."""

    model_config = ConfigDict(strict=True)

    path: str
    """Where it lay."""
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: str
    kept: bool
    """Whether its content lies beside `launch.json`."""


class LaunchRecord(BaseModel):
    """The content of `launch.json`."""

    model_config = ConfigDict(strict=True)

    format: Annotated[int, Field(ge=1, le=1)] = 1
    step: Annotated[int, Field(ge=0)]
    """The step at which the launch began to train."""
    time: str = ""
    command: list[str] = []
    overrides: list[str] = []
    world_size: int = 1
    commit: str | None = None
    """The git commit of the folder of the cfg.py; None outside a repository."""
    dirty: bool = False
    versions: dict[str, str] = {}
    files: dict[KeptName, KeptFile] = {}
    knows_modules: bool = True
    """False if an older release began the run: it kept the cfg.py alone."""
    built: dict[str, dict[str, JsonValue]] | None = None
    """The values with which the config built the optimizer and the schedule."""

    @property
    def git(self) -> GitState | None:
        """The state of the git repository."""
        return None if self.commit is None else GitState(self.commit, self.dirty)


class KeptLaunch:
    """A launch that a run directory keeps: its number, its record and its folder."""

    def __init__(self, folder: Path, number: int, record: LaunchRecord, cfg_py: Path | None = None) -> None:
        self.folder = folder
        self.number = number
        self.record = record
        self._cfg_py = cfg_py

    def content(self, name: str) -> bytes | None:
        """Return the content of a kept file; None if it is not kept, or not what was kept."""
        listed = self.record.files.get(name)
        path = self.folder / name if self._cfg_py is None else self._cfg_py
        if listed is None or not listed.kept:
            return None
        try:
            if self._cfg_py is None and not path.resolve().is_relative_to(self.folder.resolve()):
                return None
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except (OSError, RuntimeError):
            return None
        return data if hashlib.sha256(data).hexdigest() == listed.sha256 else None


def read_launches(launches: Path, cfg_py: Path) -> list[KeptLaunch]:
    """Return the kept launches, oldest first; of an older release's run its cfg.py, as launch 0."""
    kept = []
    for number, folder in _numbered(launches):
        try:
            kept.append(KeptLaunch(folder, number, LaunchRecord.model_validate(read_json(folder / LAUNCH_JSON))))
        except (OSError, ValueError) as error:
            problem = "no launch.json of this release" if isinstance(error, ValidationError) else error
            logger.warning("%s counts as absent: %s", folder, problem)
    if not kept and (old := _older_release(cfg_py)) is not None:
        kept.append(KeptLaunch(launches, 0, old, cfg_py))
    return kept


def launch_before(launches: list[KeptLaunch], step: int) -> KeptLaunch | None:
    """Return the launch that did step `step`, and saved it: the newest that began before; None without one."""
    return next((each for each in reversed(launches) if each.record.step < step), None)


def _numbered(launches: Path) -> list[tuple[int, Path]]:
    try:
        names = os.listdir(launches)
    except OSError:
        return []
    return sorted((int(name), launches / name) for name in names if re.fullmatch(r"[0-9]{4,9}", name))


def _older_release(cfg_py: Path) -> LaunchRecord | None:
    """Return the record of a run of an older release, which kept its cfg.py alone; None without one."""
    try:
        with cfg_py.open("rb") as file:
            data = file.read(MAX_FILE_BYTES)
    except OSError:
        return None
    listed = KeptFile(path=str(cfg_py), size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), kept=True)
    return LaunchRecord(step=0, files={"cfg.py": listed}, knows_modules=False)


def keep_launch(
    launches: Path,
    record: LaunchRecord,
    files: Mapping[str, SourceFile],
    before: list[KeptLaunch],
    changes: Callable[[], bytes | None] = lambda: None,
) -> int:
    """Keep a launch unless it is the newest one of `before` again; return its number.

    `changes` returns the diff of the repository to its commit, which is kept as `changes.diff`.
    """
    if before and before[-1].number == 0:  # an older release's
        _write(launches, 1, before[-1].record, {"cfg.py": before[-1].content("cfg.py")}, None)
        before = [KeptLaunch(launches / "0001", 1, before[-1].record)]
    newest = before[-1] if before else None
    if newest is not None and is_same_launch(newest.record, record):
        return newest.number
    number = max([number for number, _ in _numbered(launches)], default=0) + 1
    contents = {name: file.content for name, file in files.items()}
    _write(launches, number, record, {**contents, CHANGES: changes()}, newest)
    return number


def record_files(files: Mapping[str, SourceFile]) -> dict[str, KeptFile]:
    """Return the list of own files for `launch.json`."""
    return {
        name: KeptFile(path=f.path, size_bytes=f.size_bytes, sha256=f.sha256, kept=f.content is not None)
        for name, f in files.items()
    }


def now_text() -> str:
    """Return the present time for `launch.json`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def is_same_launch(left: LaunchRecord, right: LaunchRecord) -> bool:
    """Return whether two launches have the same files, versions, command, commit and built values."""
    common = left.versions.keys() & right.versions.keys()  # some packages are imported late, and by one rank alone
    identities = [
        (
            {name: file.sha256 for name, file in record.files.items()},
            {name: record.versions[name] for name in common},
            (record.command, record.overrides, record.git, record.built, record.knows_modules),
        )
        for record in (left, right)
    ]
    return identities[0] == identities[1]


def _write(
    launches: Path, number: int, record: LaunchRecord, contents: Mapping[str, bytes | None], like: KeptLaunch | None
) -> None:
    """Make the folder of a launch, in one step; a file that `like` holds too is a hard link to it."""
    launches.mkdir(parents=True, exist_ok=True)
    for leftover in launches.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = launches / f".tmp-{number:04d}"
    folder.mkdir()
    for name, data in contents.items():
        if data is None:
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if like is None or like.content(name) != data or not _linked(like.folder / name, path):
            write_file(path, data)
    text = json_text(json.loads(record.model_dump_json()), indent=1)
    write_file(folder / LAUNCH_JSON, f"{text}\n".encode())
    folder.rename(launches / f"{number:04d}")
    fsync_directory(launches)


def _linked(old: Path, new: Path) -> bool:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:  # a file system without hard links
        return False
    return True
