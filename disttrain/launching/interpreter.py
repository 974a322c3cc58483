"""An interpreter of its own off which ranks are forked, started with other surroundings than this process has.

*Contract*: the interpreter shares nothing with this process but the machine, the user and the variables that its
`Surroundings` leave alone. It begins as `python -m disttrain.launch` does, which replaces some of them. It imports
modules at once, and runs ranks once; it ends with them, with this process, or with `close`. A rank behaves as one of
`LocalRanks`.

*Cost*: the interpreter starts in the background; the import of torch takes some seconds of one core.
"""

import importlib
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from disttrain.environment import variables_with
from disttrain.errors import DisttrainError
from disttrain.launching.local_ranks import LocalRanks, log_of
from disttrain.process import SETTINGS

_START = """import sys
sys.path[:] = {path!r}
from disttrain.process import begin_process
begin_process()
from disttrain.launching.interpreter import _main
sys.exit(_main())"""
_PROGRAM = "disttrain.launch"
"""The word by which `begin_process` knows a program of this package: the interpreter stands for that one."""
_ENDED = "ended.json"
_ENDS_WITHIN_S = 10.0


@dataclass(frozen=True)
class Surroundings:
    """The settings that a process gets at its start and not from a config; None: as this process has it."""

    hash_seed: int = 1
    threads: int = 1
    working_directory: Path | None = None
    temporary_directory: Path | None = None
    time_zone: str | None = None
    umask: int | None = None
    start_method: str | None = None
    """The way in which loader workers are started."""

    def variables(self) -> dict[str, str]:
        """Return the environment variables that hold these settings."""
        named = {"TMPDIR": self.temporary_directory, "TZ": self.time_zone}
        return {
            "PYTHONHASHSEED": str(self.hash_seed),
            **{name: str(self.threads) for name in SETTINGS if name.endswith("_THREADS")},
            **{name: str(value) for name, value in named.items() if value is not None},
        }


class RanksEnded(NamedTuple):
    """The exit codes of ranks, and that of the first which failed, as in `LocalRanks`; the files of their output."""

    codes: list[int]
    first_failed: int | None
    logs: list[Path]


class Interpreter:
    """Starts an interpreter that imports the modules `preload`; `run` then runs ranks in it, once.

    It has the variables of this process, but for those of `surroundings` and `variables`.
    """

    def __init__(
        self, surroundings: Surroundings, preload: Sequence[str], variables: Mapping[str, str] | None = None
    ) -> None:
        for folder in (surroundings.working_directory, surroundings.temporary_directory):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        self.surroundings = surroundings
        self._has_job = False
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        # Absolute, because the working directory may be another one.
        start = _START.format(path=[os.path.abspath(folder) for folder in sys.path])
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, _PROGRAM, *preload],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            cwd=surroundings.working_directory,
            env=variables_with({**surroundings.variables(), **(variables or {})}),
            umask=-1 if surroundings.umask is None else surroundings.umask,
            start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which ends the interpreter
        )

    def run(self, world_size: int, target: Callable[..., int], arguments: Sequence[Any], logs: Path) -> RanksEnded:
        """Run `target(*arguments)` on each rank and wait until all have ended; DisttrainError if that fails.

        The ranks print into files in the new folder `logs`.
        """
        self._has_job = True
        logs.mkdir(parents=True)
        job = (world_size, target, tuple(arguments), logs, self.surroundings.start_method)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; its output says why
            pickle.dump(job, self._process.stdin)
            self._process.stdin.flush()
        code = self._process.wait()
        report = logs / _ENDED
        if code or not report.exists():
            self._output.seek(0)
            raise DisttrainError(
                f"expected an interpreter with other settings to run the ranks, got one that ended with {code}. "
                f"Its output:\n{self._output.read().decode(errors='replace').strip()}"
            )
        codes, first_failed = json.loads(report.read_text(encoding="utf-8"))
        return RanksEnded(codes, first_failed, [log_of(logs, rank) for rank in range(world_size)])

    def close(self) -> None:
        """End the interpreter and its ranks, if they still run."""
        assert self._process.stdin is not None
        if not self._has_job:
            self._process.kill()
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # it ends its ranks when its input ends
        try:
            self._process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()


def _main() -> int:
    """Be the interpreter: import the modules that the arguments name, then run the ranks that the input describes."""
    for name in sys.argv[2:]:
        importlib.import_module(name)
    try:
        world_size, target, arguments, logs, method = pickle.load(sys.stdin.buffer)  # noqa: S301 - from `Interpreter`
    except EOFError:
        return 0  # it was started ahead, and is not needed
    if method is not None:
        multiprocessing.set_start_method(method)
    closed = threading.Event()
    with LocalRanks(world_size, target, arguments, logs, fork=True) as ranks:
        threading.Thread(target=_end_with_input, args=(ranks, closed), daemon=True).start()
        codes = ranks.wait()
    if closed.is_set():
        return 1  # the ranks have not ended by themselves
    (logs / _ENDED).write_text(json.dumps([codes, ranks.first_failed]), encoding="utf-8")
    return 0


def _end_with_input(ranks: LocalRanks, closed: threading.Event) -> None:
    """End this process and its ranks when the process that started it has ended, or closes this one's input."""
    # Not by sys.stdin: a thread that waits in it holds a lock that the interpreter needs at its end.
    while os.read(0, 1):
        pass
    closed.set()
    ranks.kill()
    os._exit(1)
