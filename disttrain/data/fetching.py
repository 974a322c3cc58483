"""Fetches batches in this process, or in worker processes that it starts, ends and protects from signals.

*Contract*: the global generators are left unchanged. A batch is loaded with one intra-op thread of torch, in a worker
or here, because the number of threads changes bits. A worker ignores the signals that a terminal or a batch system
sends to every process of a job. It ends within about a second of the process that started it. Workers are started by
the default method of `multiprocessing`.

*Errors*: an exception of a sample or of a collate function becomes a `LoadingError` of one line. If a worker dies
before its batch arrives, that is one too.
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
from typing import Any

import torch
from torch.utils.data import DataLoader

from disttrain.data.dataset import LoadingError
from disttrain.files import keep_socket_paths_short
from disttrain.seeding import random_state_kept

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""The signals that a worker ignores; its parent handles them."""
PARENT_CHECK_INTERVAL_S = 1.0
DEAD_WORKER_ERRORS = (RuntimeError, OSError, EOFError)
"""The errors that a dead worker causes: torch's own, and those of a connection that breaks in the middle of a batch."""


class Fetching:
    """Runs an inner DataLoader: turns requests into batches, in order, and owns its workers.

    `start` gets the requests. `dataset.__getitems__(request)` returns the batch of a request, already collated.
    """

    def __init__(self, dataset: Any, num_workers: int, pin_memory: bool) -> None:
        self._dataset = dataset
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self.took_s = 0.0
        """The time that this process has spent so far on loading batches, or on waiting for them."""
        self._iterator: Any = None
        self._process = os.getpid()

    @property
    def started(self) -> bool:
        return self._iterator is not None

    def start(self, requests: Iterable[Any]) -> None:
        """Begin to fetch the batches of `requests`, in this order. The n-th request goes to worker n % num_workers."""
        # Without a generator of its own, torch draws the base seed of the workers from the global one. The value does
        # not matter, because each batch is seeded by itself.
        loader = DataLoader(
            self._dataset,
            batch_sampler=requests,
            collate_fn=_unchanged,
            generator=torch.Generator(),
            worker_init_fn=functools.partial(_guard_worker, collecting=gc.isenabled()),
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
        )
        if self._num_workers:
            keep_socket_paths_short()
        if self._num_workers and multiprocessing.get_start_method() != "fork":
            resource_tracker.ensure_running()  # else it starts below, and on some Pythons that unblocks signals
        with _signals_blocked(), _collection_paused():
            self._iterator = iter(loader)

    def take(self, count: int) -> list[Any]:
        """Return the next `count` batches. An error ends the iterator, because its position is lost."""
        began = time.perf_counter()
        try:
            with nullcontext() if self._num_workers else _as_in_a_worker():
                batches = [next(self._iterator) for _ in range(count)]
            self.took_s += time.perf_counter() - began
            return batches
        except BaseException as error:
            suspicious = isinstance(error, DEAD_WORKER_ERRORS) and not isinstance(error, LoadingError)
            died = suspicious and self._has_dead_worker()
            self.stop()
            if died:
                raise LoadingError(
                    "a data loading worker ended, expected it to live as long as the run "
                    f"({type(error).__name__}: {error}); it was killed, perhaps because memory or shared memory "
                    "(/dev/shm) ran out: use fewer workers or smaller batches"
                ) from error
            raise

    def _has_dead_worker(self) -> bool:
        if self._num_workers == 0:
            return False
        try:
            # The error may arrive before the worker has ended, so wait a moment for its end.
            return bool(connection.wait([worker.sentinel for worker in self._iterator._workers], timeout=1.0))
        except RuntimeError:
            return True  # torch raises it in its SIGCHLD handler, so it can come at any point

    def stop(self) -> None:
        """End the iterator and its workers, if there are any, in whatever state they are."""
        iterator, self._iterator = self._iterator, None
        # A forked process has a copy of this object, but the workers are not its children.
        if iterator is None or self._num_workers == 0 or os.getpid() != self._process:
            return
        # torch ends workers when the iterator is collected. A traceback that refers to it would delay that.
        with suppress(RuntimeError):  # from torch's SIGCHLD handler: a worker ended by itself
            iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()
                worker.join()


@contextmanager
def _as_in_a_worker() -> Iterator[None]:
    """Use one intra-op thread, as a worker does, and restore it and the global generators afterwards."""
    num_threads = torch.get_num_threads()
    with random_state_kept():
        if num_threads != 1:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if num_threads != 1:
                torch.set_num_threads(num_threads)


def _unchanged(batch: Any) -> Any:
    return batch


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals while processes are started, until those ignore them; this process gets them afterwards.

    If multiprocessing's fork server is started here, it never gets them. Its end would end the workers too.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*IGNORED_SIGNALS, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Pause the garbage collector until a forked worker has frozen the objects that it inherited.

    Unreachable objects of the parent may be connections to other ranks, or hold memory of an accelerator. A fork lacks
    their threads, so destroying them there crashes or hangs the worker.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _guard_worker(worker_id: int, *, collecting: bool) -> None:
    """Bind a worker to its parent: it ends when the parent ends, or when the parent sends SIGTERM.

    A terminal or a batch system signals every process of a job. Only the parent reacts to that, and it may need its
    workers for one more step.
    """
    gc.freeze()
    if collecting:
        gc.enable()
    for signum in IGNORED_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(starter: int) -> None:
    """Wait until the parent has ended or sends SIGTERM, then end this process. SIGTERM from others is ignored.

    `starter` is the process that started this one: the parent, or multiprocessing's fork server, which ends with it.
    """
    parent = parent_process()
    assert parent is not None, "a worker has a parent"
    while os.getppid() == starter and parent.is_alive():
        if not hasattr(signal, "sigtimedwait"):  # macOS: there SIGTERM stays blocked, and `stop` ends with SIGKILL
            time.sleep(PARENT_CHECK_INTERVAL_S)
            continue
        received = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_INTERVAL_S)
        if received is not None and received.si_pid in (parent.pid, starter):
            break
    os._exit(0)
