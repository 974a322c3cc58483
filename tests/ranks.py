"""A pool of real gloo ranks for tests: the processes stay alive, because importing torch takes seconds.

    def sums(backend, value):                     # a function of the test module, not a closure
        return backend.all_reduce(value + backend.rank)

    def test_sums(ranks):
        assert ranks(3, sums, 10) == [33, 33, 33]

*Contract*: each call connects its ranks anew by `disttrain.backend.connect`, through the rank variables that torchrun
sets and a store that outlives the calls, like that of torchrun's agent. After a call, every process restores its
environment and its working directory; before the next call, it resets threads, seeds and torch settings. `fresh=True`
starts processes for this call alone, for functions that kill themselves or leave something that cannot be undone.

*Errors*: a rank's exception becomes `Err`, its death `Died`; a call of the pool raises RankFailure for either. If ranks
take too long, the pool prints all their stacks, kills them and replaces them.
"""

import faulthandler
import importlib.util
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple

MAX_RANKS = 8
GRACE_S = 8.0
"""Seconds before the ranks are killed, after the timeout of a call or the failure of one rank."""


@dataclass(frozen=True)
class Ok:
    """The value that a rank returned."""

    value: Any


@dataclass(frozen=True)
class Err:
    """The exception that a rank raised, and its traceback as text."""

    error: BaseException
    text: str


@dataclass(frozen=True)
class Died:
    """A rank that ended without a result; a negative code is the signal that killed it. `log` is its output."""

    code: int
    log: str


Outcome = Ok | Err | Died


class RankFailure(AssertionError):
    """A rank raised, died or took too long; `outcomes` has the outcome of each rank."""

    def __init__(self, message: str, outcomes: list[Outcome]) -> None:
        super().__init__(message)
        self.outcomes = outcomes


class Task(NamedTuple):
    """The call that a process makes: the place of its function, the variables, and the pickled arguments."""

    module: str
    file: str
    function: str
    path: list[str]
    variables: dict[str, str]
    timeout_s: float
    arguments: bytes


class Ranks:
    """The pool. `Ranks()` starts nothing; a process starts when a call needs it."""

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s
        # torch looks the name of every peer up at the nameserver: one lost packet would cost 5 s.
        os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
        self._processes: list[_Process] = []
        self._store: Any = None

    def __call__(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0, fresh: bool = False
    ) -> list[Any]:
        """Run `function(backend, *args)` on every rank and return the results by rank."""
        outcomes = self.outcomes(world_size, function, *args, timeout_s=timeout_s, fresh=fresh)
        failed = [f"rank {rank}:\n{_show(o)}" for rank, o in enumerate(outcomes) if not isinstance(o, Ok)]
        if failed:
            raise RankFailure("\n".join(failed), outcomes)
        return [outcome.value for outcome in outcomes if isinstance(outcome, Ok)]

    def outcomes(
        self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0, fresh: bool = False
    ) -> list[Outcome]:
        """Run `function(backend, *args)` on every rank and return the outcomes by rank."""
        processes = [_Process() for _ in range(world_size)] if fresh else self._first(world_size)
        try:
            for rank, process in enumerate(processes):
                process.send(self._task(function, args, rank, world_size, timeout_s))
            return _collect(processes, time.monotonic() + timeout_s + self._grace_s, self._grace_s)
        finally:
            if fresh:
                for process in processes:
                    process.kill()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        self._processes.clear()

    def _first(self, world_size: int) -> list["_Process"]:
        assert world_size <= MAX_RANKS, f"the pool has at most {MAX_RANKS} ranks, got {world_size}"
        for index, process in enumerate(self._processes):
            if not process.alive:
                process.kill()
                self._processes[index] = _Process()
        while len(self._processes) < world_size:
            self._processes.append(_Process())
        return self._processes[:world_size]

    def _task(
        self, function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, timeout_s: float
    ) -> Task:
        if self._store is None:
            from torch.distributed import TCPStore

            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        assert "<" not in function.__qualname__, f"{function.__qualname__} must be a function of its module"
        variables = {
            "RANK": rank,
            "WORLD_SIZE": world_size,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": world_size,
            "GROUP_RANK": 0,
            "GROUP_WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self._store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": 0,
        }
        return Task(
            function.__module__,
            str(Path(sys.modules[function.__module__].__file__ or "")),
            function.__qualname__,
            list(sys.path),
            {name: str(value) for name, value in variables.items()},
            timeout_s,
            pickle.dumps(args),
        )


class _Process:
    """One process of the pool, and the parent's end of its pipe."""

    def __init__(self) -> None:
        self._pipe, child = Pipe()
        self._log = tempfile.NamedTemporaryFile(prefix="disttrain-rank-", suffix=".log")  # noqa: SIM115
        command = [sys.executable, "-u", __file__, str(child.fileno())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._popen = subprocess.Popen(
            command,
            pass_fds=[child.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=environment,
        )
        child.close()

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    @property
    def pipe(self) -> Connection:
        return self._pipe

    def send(self, task: Task) -> None:
        os.truncate(self._log.name, 0)
        self._pipe.send_bytes(pickle.dumps(tuple(task)))

    def receive(self) -> Outcome:
        """Return the outcome that has arrived, or `Died`."""
        try:
            is_ok, data, text = pickle.loads(self._pipe.recv_bytes())
            value = pickle.loads(data)
        except (EOFError, OSError):
            return Died(self._popen.wait(GRACE_S), self.log())
        except Exception as error:  # a result that cannot be unpickled here is a mistake of the test, not of the pool
            return Err(error, traceback.format_exc())
        return Ok(value) if is_ok else Err(value, text)

    def dump(self) -> str:
        """Return the output of the process, with the stacks of all its threads at the end."""
        self._popen.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        return self.log()

    def log(self) -> str:
        return Path(self._log.name).read_text(errors="replace")

    def kill(self) -> None:
        if self.alive:
            self._popen.kill()
        self._popen.wait()
        self._pipe.close()
        self._log.close()


def _collect(processes: list[_Process], deadline: float, grace_s: float) -> list[Outcome]:
    """Return the outcomes by rank; a rank that failed gives the others `grace_s` to notice."""
    outcomes: dict[int, Outcome] = {}
    while len(outcomes) < len(processes):
        waiting = {process.pipe: rank for rank, process in enumerate(processes) if rank not in outcomes}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            outcomes[rank] = processes[rank].receive()
            if not isinstance(outcomes[rank], Ok):
                deadline = min(deadline, time.monotonic() + grace_s)
        if not ready:
            stacks = [f"rank {rank} hangs:\n{processes[rank].dump()}" for rank in sorted(waiting.values())]
            for rank in waiting.values():
                processes[rank].kill()
                outcomes[rank] = Died(-signal.SIGKILL, "killed by the pool")
            shown = [f"rank {rank}:\n{_show(o)}" for rank, o in sorted(outcomes.items()) if not isinstance(o, Ok)]
            raise RankFailure("\n".join(stacks + shown), [outcomes[rank] for rank in sorted(outcomes)])
    return [outcomes[rank] for rank in range(len(processes))]


def _show(outcome: Outcome) -> str:
    if isinstance(outcome, Err):
        return outcome.text
    return f"ended with code {outcome.code}\n{outcome.log}" if isinstance(outcome, Died) else repr(outcome.value)


def serve(pipe: Connection) -> None:
    """Run tasks until the parent has ended: the main loop of a process of the pool."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    while True:
        try:
            task = Task(*pickle.loads(pipe.recv_bytes()))
        except EOFError:
            return
        pipe.send_bytes(pickle.dumps(_answer(task)))


def _answer(task: Task) -> tuple[bool, bytes, str]:
    """Run a task; return whether it succeeded, the pickled result or error, and the error's traceback."""
    environment, directory = dict(os.environ), Path.cwd()
    try:
        _reset()
        return True, pickle.dumps(_run(task)), ""
    except BaseException as error:
        text = traceback.format_exc()
        try:
            data = pickle.dumps(error)
            pickle.loads(data)
        except Exception:
            data = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
        return False, data, text
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)


def _run(task: Task) -> Any:
    from disttrain.backend import connect

    os.environ.update(task.variables)
    function: Any = _module(task)
    for name in task.function.split("."):
        function = getattr(function, name)
    arguments = pickle.loads(task.arguments)
    with connect("gloo", timeout_s=task.timeout_s) as backend:
        return function(backend, *arguments)


def _module(task: Task) -> Any:
    """Import the test module under the name that pytest gave it, so that its objects can be pickled by that name."""
    sys.path[:] = task.path
    if task.module not in sys.modules:
        spec = importlib.util.spec_from_file_location(task.module, task.file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[task.module] = module
        spec.loader.exec_module(module)
    return sys.modules[task.module]


def _reset() -> None:
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = False


def _die_with_parent() -> None:
    """Ask Linux to kill this process when pytest is killed."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    _die_with_parent()
    import ranks

    ranks.serve(Connection(int(sys.argv[1])))
