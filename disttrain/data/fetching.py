"""Where batches are fetched: in this process or in workers, which live, die and hear signals with it alone.

*Contract*: the global generators are left as they were found. A worker ignores the signals that a terminal or a
batch system sends to every process of a job, and ends within about a second of the process that started it.

*Errors*: whatever a sample or a collate function raises comes as a `LoadingError` of one line; a worker that dies
while its batch is awaited as a `DataError`.
"""

import functools
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import connection, parent_process, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch.utils.data import DataLoader

from disttrain.data.dataset import LoadingError
from disttrain.errors import DataError
from disttrain.seeding import random_state_kept

LEFT_TO_THE_PARENT = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PARENT_IS_WATCHED_EVERY_S = 1.0
WHAT_A_DEAD_WORKER_LEAVES = (RuntimeError, OSError, EOFError)
"""torch's own error, and those of a connection to it that broke in the middle of a batch."""


class Fetching:
    """An inner DataLoader and its one running iterator: where batches are fetched and workers live.

    `dataset.__getitems__(request)` returns what is fetched as it is; requests are what `start` is given.
    """

    def __init__(
        self,
        dataset: Any,
        num_workers: int,
        pin_memory: bool,
        prefetch_factor: int | None,
        multiprocessing_context: str | BaseContext | None,
    ) -> None:
        self._dataset = dataset
        self._options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        if num_workers:
            # Without workers torch refuses these two; here they say how workers are, if there are any.
            self._options.update(
                prefetch_factor=prefetch_factor,
                multiprocessing_context=multiprocessing_context,
            )
        self.took_s = 0.0
        """Time in which batches were loaded, or waited for, so far."""
        self._iterator: Any = None
        self._process = os.getpid()

    @property
    def started(self) -> bool:
        return self._iterator is not None

    def start(self, requests: Iterable[Any]) -> None:
        """Begin to fetch what `requests` ask for, in this order; the n-th goes to worker n % num_workers."""
        # The generator is for the workers' base seed, which would else be drawn from the global one. Each batch
        # is seeded by itself, so what it gives does not matter.
        loader = DataLoader(
            self._dataset,
            batch_sampler=requests,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
            worker_init_fn=functools.partial(_guard_worker, collecting=gc.isenabled()),
            **self._options,
        )
        context = loader.multiprocessing_context
        if self._options["num_workers"] and (context or multiprocessing).get_start_method() != "fork":
            resource_tracker.ensure_running()  # else it starts below, which on some Pythons lets signals in again
        with _signals_held_back(), _garbage_left_alone():
            self._iterator = iter(loader)

    def take(self, count: int) -> list[Any]:
        """Return the next `count` batches; an error ends the iterator, which has lost its place."""
        here = self._options["num_workers"] == 0
        began = time.perf_counter()
        try:
            with random_state_kept() if here else nullcontext():
                batches = [next(self._iterator) for _ in range(count)]
            self.took_s += time.perf_counter() - began
            return batches
        except BaseException as error:
            broken = isinstance(error, WHAT_A_DEAD_WORKER_LEAVES) and not isinstance(error, LoadingError)
            died = broken and self._has_dead_worker()
            self.stop()
            if died:
                raise DataError(
                    f"a data loading worker ended, expected it to live as long as the run ({type(error).__name__}: "
                    f"{error}); it was killed, perhaps because memory or shared memory (/dev/shm) ran out: "
                    "use fewer workers or smaller batches"
                ) from error
            raise

    def _has_dead_worker(self) -> bool:
        if self._options["num_workers"] == 0:
            return False
        try:
            # What it left undone may be seen before its end, so that is given a moment.
            return bool(connection.wait([worker.sentinel for worker in self._iterator._workers], timeout=1.0))
        except RuntimeError:
            return True  # torch raises that from its handler of SIGCHLD, in the midst of anything

    def stop(self) -> None:
        """End the iterator and its workers, whatever state they are in; nothing to do where there are none."""
        iterator, self._iterator = self._iterator, None
        # A process that was forked off has a copy of this, but not the workers.
        if iterator is None or self._options["num_workers"] == 0 or os.getpid() != self._process:
            return
        # torch ends workers when the iterator is collected, which a traceback that holds it would put off.
        with suppress(RuntimeError):  # that of torch's handler of SIGCHLD: one has ended before it was told to
            iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()
                worker.join()


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Keep signals from processes that are started here until they ignore them; this one gets them afterwards.

    multiprocessing's fork server, if it is started here, never gets them: its end would be the workers'.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*LEFT_TO_THE_PARENT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _garbage_left_alone() -> Iterator[None]:
    """Collect no garbage until a process that is forked off here has put aside what it was born with.

    Unreachable objects of the parent may be connections to other ranks or hold an accelerator's memory; to destroy
    those in a fork, where their threads are missing, crashes or hangs it.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _guard_worker(worker_id: int, *, collecting: bool) -> None:
    """Tie a worker to the process that started it: it ends with that one, or when that one says so.

    A terminal or a batch system signals every process of a job. The parent decides what that means, and may need
    its workers for one more step.
    """
    gc.freeze()
    if collecting:
        gc.enable()
    for signum in LEFT_TO_THE_PARENT:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(above: int) -> None:
    """Wait until the parent is gone or sends SIGTERM, then end this process; from others SIGTERM is ignored.

    `above` is the process above this one: the parent, or multiprocessing's fork server, which ends with it.
    """
    parent = parent_process()
    assert parent is not None, "a worker has a parent"
    while os.getppid() == above and parent.is_alive():
        if not hasattr(signal, "sigtimedwait"):  # macOS: there SIGTERM stays blocked, and `stop` ends with SIGKILL
            time.sleep(PARENT_IS_WATCHED_EVERY_S)
            continue
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_IS_WATCHED_EVERY_S)
        if received is not None and received.si_pid in (parent.pid, above):
            break
    os._exit(0)
