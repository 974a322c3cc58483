"""Real XLA replicas on the CPU device for tests: a process with one thread for each, and collectives that work.

    def sums(backend, value):                      # a function of the test module, not a closure
        return backend.all_reduce(value + backend.rank)

    def test_sums(replicas):
        assert replicas(4, sums, 10) == [46, 46, 46, 46]

torch_xla 2.9 runs replicas of its CPU device as threads of one process, and then any collective aborts, for three
reasons, which this module removes. The pool of executing threads has as many threads as there are cores, and blocked
threads count. Donated buffers block the replicas' rendezvous. Each thread compiles programs of its own, whose
collectives never match. So replica 0 compiles first at each sync, and the others find its program in the cache.

*Contract*: there is a process for each number of replicas, which runs one function at a time. A function that takes
longer than `LIMIT_S` is a failure that shows all stacks, and ends its process. So does a replica that misses a sync.
"""

import faulthandler
import functools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import ranks  # tests/ranks.py, the pool of gloo ranks; this pool sends functions to processes in the same way

START_LIMIT_S = 150.0
"""The limit for the import of torch and torch_xla in a process, which takes 3 s on an idle machine."""
LIMIT_S = 60.0
SYNC_LIMIT_S = 15.0


class Replicas:
    """The processes by their number of replicas; they start when a call needs them."""

    def __init__(self) -> None:
        self._processes: dict[int, _Process] = {}

    def __call__(self, size: int, function: Callable[..., Any], *args: Any, limit_s: float = LIMIT_S) -> list[Any]:
        """Run `function(backend, *args)` on every replica and return the results by rank."""
        if size not in self._processes or not self._processes[size].alive:
            self._processes[size] = _Process(size)
        task = ranks.Task(
            function.__module__,
            str(Path(sys.modules[function.__module__].__file__ or "")),
            function.__qualname__,
            list(sys.path),
            {},
            limit_s,
            ranks.pickle.dumps(args),
        )
        return self._processes[size].run(task, limit_s)

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()


class _Process:
    """One process of replicas, and this end of its pipe."""

    def __init__(self, size: int) -> None:
        self._is_ready = False
        self._pipe, child = Pipe()
        self._log = tempfile.NamedTemporaryFile(prefix="disttrain-xla-", suffix=".log")  # noqa: SIM115
        self._popen = subprocess.Popen(
            [sys.executable, "-u", __file__, str(child.fileno()), str(size)],
            pass_fds=[child.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, **environment(size), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        child.close()
        assert self._pipe.poll(START_LIMIT_S), f"the replicas did not start in {START_LIMIT_S:g} s:\n{self._tail()}"

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    def run(self, task: ranks.Task, limit_s: float) -> list[Any]:
        if not self._is_ready:
            self._is_ready = bool(self._receive())
        self._pipe.send_bytes(ranks.pickle.dumps(tuple(task)))
        if not self._pipe.poll(limit_s):
            self._popen.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
            self.kill()
            raise AssertionError(f"the replicas took longer than {limit_s:g} s:\n{self._tail()}")
        outcomes = ranks.pickle.loads(self._receive())
        failed = [f"replica {rank}:\n{text}" for rank, (_, text) in enumerate(outcomes) if text]
        if failed:
            self.kill()  # the other replicas may wait for this one
            raise AssertionError("\n".join(failed))
        return [ranks.pickle.loads(data) for data, _ in outcomes]

    def _receive(self) -> bytes:
        try:
            return self._pipe.recv_bytes()
        except (EOFError, OSError):
            raise AssertionError(f"the replicas died with code {self._popen.wait(5)}:\n{self._tail()}") from None

    def _tail(self) -> str:
        return Path(self._log.name).read_text(errors="replace")[-20000:]

    def kill(self) -> None:
        if self.alive:
            self._popen.kill()
        self._popen.wait()


def environment(size: int) -> dict[str, str]:
    """Return the variables that torch_xla reads when it is imported."""
    return {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(size),
        "XLA_THREAD_POOL_SIZE": str(4 * size + 4),
        "XLA_ENABLE_PARAM_ALIASING": "0",
    }


class MissedSync(RuntimeError):
    """A replica waited at a sync that another did not reach."""


def let_replica_0_compile_first(size: int) -> None:
    """Wrap torch_xla's sync: the other replicas begin when replica 0 has compiled and executes."""
    import torch_xla
    from torch_xla.debug import metrics

    library = torch_xla._XLAC
    sync = library._xla_step_marker
    together = threading.Barrier(size)
    lead = {"is_done": False, "locks_before": 0}

    def num_device_locks() -> int:
        return (metrics.metric_data("DeviceLockWait") or (0,))[0]

    def meet(rank: int) -> None:
        try:
            together.wait(SYNC_LIMIT_S)
        except threading.BrokenBarrierError:
            raise MissedSync(
                f"replica {rank} of {size} waited {SYNC_LIMIT_S:g} s for the others at torch_xla.sync(): they did not "
                "all come to it. One stopped, ran another number of steps, or read the result of a collective (.cpu(), "
                ".item(), print) before all had called torch_xla.sync()"
            ) from None

    def gated(device: str, *args: Any, **options: Any) -> Any:
        rank = library._xla_get_device_ordinal(device)
        meet(rank)
        if rank == 0:
            lead.update(is_done=False, locks_before=num_device_locks())
        meet(rank)
        if rank == 0:
            try:
                return sync(device, *args, **options)
            finally:
                lead["is_done"] = True
        # The second lock is taken for the execution, so the compilation before it is over.
        while not lead["is_done"]:
            time.sleep(5e-4)
        return sync(device, *args, **options)

    if size > 1:
        library._xla_step_marker = gated


def serve(pipe: Connection, size: int) -> None:
    """Run tasks, each in one thread a replica, until the parent has gone."""
    from torch_xla._internal import pjrt

    faulthandler.register(signal.SIGUSR1, all_threads=True)
    let_replica_0_compile_first(size)
    pipe.send_bytes(b"ready")
    while True:
        try:
            task = ranks.Task(*ranks.pickle.loads(pipe.recv_bytes()))
        except EOFError:
            return
        ranks._reset()
        module = ranks._module(task)
        answer = functools.partial(_answer, task, module)
        outcomes = pjrt._run_thread_per_device(0, 1, answer, pjrt.initialize_multiprocess)
        pipe.send_bytes(ranks.pickle.dumps([outcomes[rank] for rank in range(size)]))


def _answer(task: ranks.Task, module: Any) -> tuple[bytes, str]:
    """Return the pickled result of one replica, and the traceback if it raised."""
    from disttrain.backend import connect

    try:
        function = getattr(module, task.function)
        arguments = ranks.pickle.loads(task.arguments)
        with connect("xla", timeout_s=SYNC_LIMIT_S) as backend:
            return ranks.pickle.dumps(function(backend, *arguments)), ""
    except BaseException:
        return b"", ranks.traceback.format_exc()


if __name__ == "__main__":
    ranks._die_with_parent()
    import replicas

    replicas.serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
