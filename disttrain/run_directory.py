"""A run's directory: its names, its lock, and the small files that say what the run is and how it ended.

*Contract*: only rank 0 writes here (each rank its own log apart). Every small file is replaced in one step, so
a reader sees the old one or the new one. One process at a time holds a run directory; the lock goes with
the process, however it dies.

    runs/NAME/
      config.json      what the run was started with, one dotted field a line
      cfg.py           the file it came from
      overrides.json   the key=value words of the command line
      launch.json      what launched it last, if that outlives its ranks
      checkpoints/     step-00000140/, ... newest last
      ledger.jsonl     what each step computed, as evidence
      metrics/         train.jsonl, valid.jsonl, and tensorboard/ where it is installed
      logs/            rank-0.log, ...
      result.json      how it ended, once it has
"""

import fcntl
import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from disttrain.errors import ConfigError

logger = logging.getLogger(__name__)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, in one step, flushed to the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def json_text(value: Any, indent: int | None = None) -> str:
    """Return `value` as JSON, which any reader takes: a number that is not finite, which JSON has not, is null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


class JsonLines:
    """A file of one JSON object a line, each with its `step`, in order, that a resumed run goes on with.

    Opening it at a step drops the lines of later steps: a killed run wrote them, and will write them again.
    A step that has its line is not written twice.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._last_step = -1
        end, last = 0, b"\n"
        with path.open("ab+") as file:
            file.seek(0)
            for line in file:
                try:
                    written = json.loads(line)["step"]
                except (ValueError, KeyError, TypeError):
                    break  # a line that a kill cut short; nothing after it is whole
                if written > step:
                    break
                self._last_step, end, last = written, end + len(line), line
            file.truncate(end)
            if not last.endswith(b"\n"):
                file.write(b"\n")
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, *lines: dict[str, Any]) -> None:
        """Write lines but for steps that have theirs: seen by others at once, safe from a power loss after `sync`."""
        for line in lines:
            if line["step"] > self._last_step:
                self._last_step = line["step"]
                self._file.write(json_text(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush what was written to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class RunDirectory:
    """The paths of one run, and what is kept in its small files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_json = path / "config.json"
        self.cfg_py = path / "cfg.py"
        self.overrides_json = path / "overrides.json"
        self.launch_json = path / "launch.json"
        self.launch_marks: list[str] = []
        """What launches the run now; `open` writes it down."""
        self.result_json = path / "result.json"
        self.checkpoints = path / "checkpoints"
        self.ledger_jsonl = path / "ledger.jsonl"
        self.metrics = path / "metrics"
        self.logs = path / "logs"
        self._lock: IO[str] | None = None

    def has_begun(self) -> bool:
        """Return whether a run has saved anything here; before that nothing binds the next one."""
        return self.checkpoints.is_dir() and any(not p.name.startswith(".") for p in self.checkpoints.iterdir())

    def open(self, *, fresh: bool = False) -> Path | None:
        """Create the directory or take it as it is, and lock it; with `fresh`, a run that is there makes room.

        Returns the path under which the old run is kept, if it had to make room. ConfigError where the
        directory cannot be written, holds something else than a run, or is in another process's hands.
        """
        kept = None
        try:
            self._acquire()
            if fresh and self.has_begun():
                kept = self._make_room()
                self._acquire()
            for folder in (self.checkpoints, self.metrics, self.logs):
                folder.mkdir(exist_ok=True)
            write_text(self.launch_json, json.dumps(self.launch_marks) + "\n")
        except OSError as error:
            raise ConfigError(
                f"the run directory {self.path} cannot be written: {error.strerror or error}; "
                "make it writable, or choose another place with --runs DIR"
            ) from None
        return kept

    def bears(self, mark: str) -> bool:
        """Return whether the launch that `mark` stands for had this run open last."""
        try:
            return mark in json.loads(self.launch_json.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            return False  # none, or a damaged one: a run of nobody's

    def _acquire(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        strangers = sorted(p.name for p in self.path.iterdir())
        if strangers and not (self.path / ".lock").exists() and not self.config_json.exists():
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
                f"the run directory {self.path} is in use by {holder}; "
                "wait for it, stop it, or choose another name=NAME"
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

    def describe(self, config: str, cfg: Path, overrides: Sequence[str]) -> None:
        """Keep the resolved config (as JSON), the file it came from and the overrides."""
        if not (self.cfg_py.exists() and self.cfg_py.samefile(cfg)):
            write_text(self.cfg_py, cfg.read_text(encoding="utf-8"))
        write_text(self.overrides_json, json.dumps(list(overrides)) + "\n")
        write_text(self.config_json, config)  # last: it is what makes the directory a run's

    def result(self) -> dict[str, Any] | None:
        """Return how the run ended, or None while it has not."""
        try:
            result: dict[str, Any] = json.loads(self.result_json.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # none, or a damaged one: the run goes on from its checkpoint and writes it again
        return result

    def finish(self, result: dict[str, Any]) -> None:
        """Keep how the run ended."""
        write_text(self.result_json, json_text(result, indent=2) + "\n")

    def interrupt(self, *, fresh: bool = False) -> None:
        """Note that a signal ended the run before its first step; an old run that was to make room is left as it is.

        Where nothing can be written that is no further error: the exit code says it too.
        """
        if fresh and self.has_begun():
            return
        try:
            self._acquire()
            ended = self.result() or {"step": 0, "epoch": 0, "metrics": {}}
            self.finish({**ended, "status": "interrupted"})
        except (ConfigError, OSError) as error:
            logger.warning("the interruption could not be noted in %s: %s", self.path, error)
        finally:
            self.close()

    def close(self) -> None:
        """Give the lock back; any number of times."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
