"""A run's directory: its names, its lock, and the small files that say what the run is and how it ended.

Contract: only rank 0 writes here (each rank its own log apart). Every small file is replaced in one step, so
a reader sees the old one or the new one. One process at a time holds a run directory; the lock goes with
the process, however it dies.

    runs/NAME/
      config.json      what the run was started with, one dotted field a line
      cfg.py           the file it came from
      overrides.json   the key=value words of the command line
      checkpoints/     step-00000140/, ... newest last
      metrics/         train.jsonl, valid.jsonl, and tensorboard/ where it is installed
      logs/            rank-0.log, ...
      result.json      how it ended, once it has
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from disttrain.errors import ConfigError


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as JSON, in one step, flushed to the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Return what the file at `path` holds, or None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; restore it, or start anew with --fresh") from None


class RunDirectory:
    """The paths of one run, and what is kept in its small files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_json = path / "config.json"
        self.cfg_py = path / "cfg.py"
        self.overrides_json = path / "overrides.json"
        self.result_json = path / "result.json"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics"
        self.logs = path / "logs"
        self._lock: IO[str] | None = None

    def exists(self) -> bool:
        """Return whether a run was started here."""
        return self.config_json.exists()

    def open(self, *, fresh: bool = False) -> Path | None:
        """Create the directory or take it as it is, and lock it; with `fresh`, a run that is there makes room.

        Returns the path under which the old run is kept, if it had to make room. ConfigError where the
        directory cannot be written, holds something else than a run, or is in another process's hands.
        """
        kept = None
        try:
            self._acquire()
            if fresh and self.exists():
                kept = self._make_room()
                self._acquire()
            for folder in (self.checkpoints, self.metrics, self.logs):
                folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the run directory {self.path} cannot be written: {error.strerror or error}; "
                "make it writable, or choose another place with --runs DIR"
            ) from None
        return kept

    def _acquire(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        strangers = sorted(p.name for p in self.path.iterdir() if p.name not in (".lock", "logs"))
        if strangers and not self.exists() and not (self.path / ".lock").exists():
            raise ConfigError(
                f"{self.path} exists and holds no run ({', '.join(strangers[:3])}); "
                "choose another name=NAME or another place with --runs DIR"
            )
        lock = (self.path / ".lock").open("a+", encoding="utf-8")
        try:
            # lockf, not flock: a loader worker that outlives a killed rank inherits flock's lock, but not this one.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise ConfigError(
                f"the run directory {self.path} is in use by {holder}; wait for it, stop it, or choose another name=NAME"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        self._lock = lock

    def _make_room(self) -> Path:
        number = 1
        while (kept := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(kept)
        self.close()
        return kept

    def describe(self, config: dict[str, Any], cfg: Path, overrides: list[str]) -> None:
        """Keep the resolved config, the file it came from and the overrides."""
        if not (self.cfg_py.exists() and self.cfg_py.samefile(cfg)):
            temporary = self.cfg_py.with_name(".cfg.py.tmp")
            shutil.copyfile(cfg, temporary)
            temporary.replace(self.cfg_py)
        write_json(self.overrides_json, overrides)
        write_json(self.config_json, config)  # last: it is what makes the directory a run's

    def result(self) -> dict[str, Any] | None:
        """Return how the run ended, or None while it has not."""
        result: dict[str, Any] | None = read_json(self.result_json)
        return result

    def close(self) -> None:
        """Give the lock back; any number of times."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
