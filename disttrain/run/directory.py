"""The run directory: its paths, its lock, and the small files that describe the run and its end.

*Contract*: only rank 0 writes here, except for the log of each rank. Every small file is replaced in one step, so a
reader sees the old one or the new one. One process at a time holds a run directory. The lock ends with the process,
however the process ends. A run that has lost its directory (removed, moved, or replaced by another run's of its name)
finds that the lock at the path is not the one that it holds, and writes nothing more there.

    runs/NAME/
      config.json      the config that the run was started with, one dotted field a line
      cfg.py           the file that the config came from
      overrides.json   the key=value words of the command line
      init_from.json   the weights with which the run began, if they are not its model's own
      launch.json      ids of the newest launch, if it outlives its ranks
      launches/        0001/, ...: the cfg.py, the modules and the versions of each launch that had others
      checkpoints/     step-00000140/, ... newest last
      ledger.jsonl     the results of each step, as evidence
      audits.jsonl     the faults that audited steps have found; absent if there are none
      metrics/         train.jsonl, valid.jsonl, and tensorboard/ if it is installed
      logs/            rank-0.log, ...
      result.json      how the run ended
"""

import fcntl
import json
import logging
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from disttrain.errors import ConfigError
from disttrain.files import json_text, read_json, write_text
from disttrain.run.result import read_result

logger = logging.getLogger(__name__)


class RunDirectory:
    """The paths of one run, its lock, and its small files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_json = path / "config.json"
        self.cfg_py = path / "cfg.py"
        self.overrides_json = path / "overrides.json"
        self.launch_json = path / "launch.json"
        self.launch_ids: list[str] = []
        """Ids of the present launch; `open` writes them."""
        self.command: list[str] = []
        """The words of the present launch, which `launches/` keeps."""
        self.init_from_json = path / "init_from.json"
        self.result_json = path / "result.json"
        self.launches = path / "launches"
        self.checkpoints = path / "checkpoints"
        self.ledger_jsonl = path / "ledger.jsonl"
        self.audits_jsonl = path / "audits.jsonl"
        self.metrics = path / "metrics"
        self.logs = path / "logs"
        self._lock: IO[str] | None = None
        self._made: list[Path] = []
        """The folders that `lock` made and nothing has used yet."""

    def has_begun(self) -> bool:
        """Return whether a run has saved a checkpoint here; until then the next run may have another config."""
        return self.checkpoints.is_dir() and any(not p.name.startswith(".") for p in self.checkpoints.iterdir())

    def open(self, *, fresh: bool = False) -> Path | None:
        """Create the directory if it is not there, and lock it; with `fresh`, rename an existing run first.

        Returns the new path of the run that was renamed, or None. ConfigError if the directory cannot be written, holds
        other files than a run's, or is locked by another process.
        """
        renamed = None
        self.lock()
        with self._writing():
            self.check_held()
            if fresh and self.has_begun():
                renamed = self._rename_old_run()
                self._acquire()
            self._made = []
            for folder in (self.checkpoints, self.metrics, self.logs):
                folder.mkdir(exist_ok=True)
            write_text(self.launch_json, json.dumps(self.launch_ids) + "\n")
        return renamed

    def lock(self) -> None:
        """Lock the directory for this process, and create it if it is not there; the errors are those of `open`.

        A run does so before its parts are built, for a handler may write files of its own there. `close` removes a
        directory that was made here if nothing has used it.
        """
        with self._writing():
            if self._lock is None:
                self._acquire()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"the run directory {self.path} cannot be written: {error.strerror or error}; "
                "make it writable, or choose another place with --runs DIR"
            ) from None

    def check_held(self) -> None:
        """Raise ConfigError unless the lock at the path is the one that this process holds.

        Nothing is checked where no lock is held, as on all ranks but rank 0. The lock is asked for again: the system
        drops it when this process closes another handle of the file, as a handler that copies the directory does.
        """
        if self._lock is None:
            return
        if not self._is_at_path(self._lock):
            raise ConfigError(
                f"the run directory {self.path} is no longer this run's: it was removed, moved or replaced while the "
                "run was using it, so nothing more is saved there; start the run again where its directory is now, or "
                "under another name=NAME"
            )
        self._lock_or_refuse(self._lock)

    def _is_at_path(self, lock: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(lock.fileno()), os.stat(self.path / ".lock"))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def is_in_use(self) -> bool:
        """Return whether another process holds the lock; the lock is not touched. False where Linux is not there."""
        if sys.platform != "linux":
            return False
        try:
            with (self.path / ".lock").open("rb") as lock:
                # struct flock: type, whence, start, length, process; the kernel writes F_UNLCK if nobody holds it.
                asked = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
                return bool(struct.unpack("hhqqi", fcntl.fcntl(lock, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK)
        except OSError:
            return False  # no lock, as in a copy of a run directory

    def was_begun_by(self, launch_id: str) -> bool:
        """Return whether the launch of this id was the last that had this run open."""
        try:
            return launch_id in read_json(self.launch_json)
        except (OSError, ValueError, TypeError):
            return False  # no file, or a damaged one

    def _acquire(self) -> None:
        while True:
            self._made += [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            others = sorted(path.name for path in self.path.iterdir())
            if others and not (self.path / ".lock").exists() and not self.config_json.exists():
                raise ConfigError(
                    f"{self.path} exists and holds no run ({', '.join(others[:3])}); "
                    "choose another name=NAME or another place with --runs DIR"
                )
            lock = (self.path / ".lock").open("a+", encoding="utf-8")
            self._lock_or_refuse(lock)
            if self._is_at_path(lock):
                break
            lock.close()  # another process has removed it, with the directory, between the last two lines
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        self._lock = lock

    def _lock_or_refuse(self, lock: IO[str]) -> None:
        """Lock the open file, also if this process holds it already; ConfigError if another process does."""
        try:
            # lockf, not flock: a loader worker that outlives a killed rank would inherit flock's lock.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise ConfigError(
                f"the run directory {self.path} is in use by {holder}; "
                "wait for it, stop it, or choose another name=NAME"
            ) from None

    def _rename_old_run(self) -> Path:
        number = 1
        while (renamed := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(renamed)
        self._made = []
        self.close()
        return renamed

    def describe(self, config: str, cfg: bytes, overrides: Sequence[str]) -> None:
        """Write the resolved config (as JSON), the content of the file it came from, and the overrides."""
        write_text(self.cfg_py, cfg)
        write_text(self.overrides_json, json.dumps(list(overrides)) + "\n")
        write_text(self.config_json, config)  # last: with it the directory is a run's

    def result(self) -> dict[str, Any] | None:
        """Return the content of result.json; None while the run has not ended, or if the file is damaged."""
        try:
            return read_result(self.result_json)
        except ConfigError as error:  # the run resumes from its checkpoint and writes it again
            logger.warning("%s", error)
            return None

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json."""
        self.check_held()
        write_text(self.result_json, json_text(result, indent=2) + "\n")

    def interrupt(self, *, fresh: bool = False) -> None:
        """Write that a signal ended the run before its first step; with `fresh`, leave an existing run as it is.

        A failure to write is logged only: the exit code tells the same.
        """
        if fresh and self.has_begun():
            return
        try:
            self.lock()
            self._made = []
            ended = self.result() or {"step": 0, "epoch": 0, "metrics": {}}
            self.finish({**ended, "status": "interrupted"})
        except (ConfigError, OSError) as error:
            logger.warning("the interruption could not be written into %s: %s", self.path, error)
        finally:
            self.close()

    def close(self) -> None:
        """Release the lock; any number of times."""
        if self._lock is None:
            return
        with suppress(OSError):  # what a handler has written there stays, with the lock by which it is a run's
            if self._made and self._is_at_path(self._lock) and os.listdir(self.path) == [".lock"]:
                (self.path / ".lock").unlink()
                for folder in self._made:
                    folder.rmdir()
        self._lock.close()
        self._lock, self._made = None, []
