"""Saves while the training continues: the training thread copies the state, another thread writes and commits it.

*Contract*: a call returns once the state is copied. The exceptions are large tensors on the CPU that the caller's
`later` selects by name: nothing may change them before `copied()` has returned. The checkpoint is the state at the
moment of the call, in the same bytes that a `DirectorySaver` writes. One save is under way at a time; the next call
waits for it.
An old checkpoint goes only after the save that came before its removal is committed. The thread calls no collective.

Every rank calls `poll` at the end of each step. If a save has failed, all ranks raise its error there, one step after
the failure was noticed. `settle` waits for the save under way, and raises its error on every rank. Leaving the context
waits too, without collectives. After a KeyboardInterrupt, which asks to stop at once, it does not wait.

*Cost*: memory for one copy of this rank's share, kept from save to save. While a save is under way, each `poll` starts
one collective, whose result the next `poll` collects.
"""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from disttrain.checkpoint.agree import CheckpointRanks, by_rank, on_one_rank
from disttrain.checkpoint.directory_saver import DirectorySaver
from disttrain.checkpoint.guarded_store import Guard
from disttrain.checkpoint.jobs import Job, write_and_commit, write_and_note
from disttrain.checkpoint.manifest import CheckpointInfo
from disttrain.checkpoint.plan import Share
from disttrain.checkpoint.staging import CopyRest, Staging
from disttrain.checkpoint.state_tree import Flat
from disttrain.checkpoint.write import write_alone

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 5.0
"""Ranks that wait for a save exchange its progress this often, so that the watchdog does not take them for hung."""


class PollingRanks(CheckpointRanks, Protocol):
    """The part of a `Backend` that `poll` needs in addition."""

    def start_any(self, flag: bool, /) -> Callable[[], bool]:
        """Start a reduction of `flag` by "or" over all ranks; the returned function waits for the result."""


class AsynchronousSaver(DirectorySaver):
    """A `DirectorySaver` whose calls return when the state is copied; a context."""

    def __init__(
        self,
        dirname: str | Path,
        *,
        describe: Callable[[], CheckpointInfo] = CheckpointInfo,
        backend: PollingRanks | None = None,
        later: Callable[[str], bool] | None = None,
        guard: Guard | None = None,
    ) -> None:
        super().__init__(dirname, describe=describe, backend=backend, guard=guard)
        self._ranks = backend
        self._job: Job | None = None
        self._under_way = False
        self._pending_poll: Callable[[], bool] | None = None
        self._later = later
        self._staging = Staging()

    def __call__(self, checkpoint: Any, filename: str, metadata: Mapping[str, Any]) -> None:
        """Wait for the save under way, copy `checkpoint`, and start to save it."""
        step = self._step(filename)
        info = self._describe()
        self.settle()
        share = self._planner.share(step, checkpoint)
        if share.num_files == 1:
            on_one_rank(self._backend, lambda: self._start_alone(step, share, info))
        else:
            self._start_together(step, share, info)
        self._under_way = True

    def _start_alone(self, step: int, share: Share, info: CheckpointInfo) -> None:
        """Copy the whole state and start to write and commit it, on this rank alone."""
        copies, copy_rest = self._staging.copy(share.flat.tensors, self._later)
        flat = Flat(share.flat.tree, copies)
        world_size = 1 if self._backend is None else self._backend.world_size

        def work(job: Job) -> None:
            job.copy(copy_rest)
            self._clean()
            write_alone(self.store, step, flat, info, world_size)

        self._job = Job(work, super().remove)

    def _start_together(self, step: int, share: Share, info: CheckpointInfo) -> None:
        """Copy this rank's part and start to write it; the thread of rank 0 waits for the other parts and commits."""
        assert self._backend is not None
        rank, world_size = self._backend.rank, self._backend.world_size

        def begin() -> str:
            self._clean()
            return self.store.begin(step)

        upload = on_one_rank(self._backend, begin)
        rests: list[CopyRest] = []

        def copy() -> None:
            rests.append(self._staging.copy(share.flat.tensors, self._later)[1])

        try:
            by_rank(self._backend, copy)
        except BaseException:
            if rank == 0:
                self.store.abandon(upload)
            raise
        if rank >= share.num_files:
            return
        staged = share._replace(flat=Flat(share.flat.tree, self._staging.copies))
        if rank:
            self._job = Job(partial(write_and_note, self.store, upload, staged, rank, rests[0]), super().remove)
        else:
            work = partial(write_and_commit, self.store, upload, step, staged, info, world_size, rests[0])
            self._job = Job(work, super().remove)

    def copied(self) -> None:
        """Wait until this rank's state is copied; call it before a change of the tensors that `later` selects."""
        if (job := self._job) is not None:
            job.copied.wait()

    @property
    def under_way(self) -> bool:
        """Whether this rank still writes its part of a save; removals that follow the save do not count."""
        return self._job is not None and self._job.is_writing

    def expected_s(self) -> float | None:
        job = self._job
        if job is None or not job.is_writing:
            return job.took_s if job is not None and job.took_s is not None else self._took_s
        so_far_s = time.monotonic() - job.began
        took_s = max(so_far_s, self._took_s or 0.0)  # a save takes at least as long as this one has taken already
        return took_s + (took_s - so_far_s)

    def abandon(self, within_s: float = 0.0) -> None:
        """Wait up to `within_s` for the save under way, on every rank; then give it up.

        The end of the process cuts off a save that was given up.
        """
        if not self._under_way:
            return
        if self._pending_poll is not None:
            self._pending_poll()
            self._pending_poll = None
        end = time.monotonic() + within_s
        is_late = False
        while not is_late:
            progress = self._gather_progress(min(REPORT_EVERY_S, end - time.monotonic()))
            if all(is_done for is_done, _ in progress):
                break
            is_late = any(by_rank(self._backend, lambda: time.monotonic() >= end))
        if not is_late:
            try:
                self.settle()
            except Exception as error:  # noqa: BLE001 - of whatever kind: this save is no longer needed
                logger.warning("the save under way has failed: %s", error)
        elif self._job is not None:
            self._job.copied.wait()
            self._staging = Staging()  # the thread still writes from the memory of the old one
        self._job, self._under_way = None, False

    def remove(self, filename: str) -> None:
        """Remove one checkpoint once the newest is committed."""
        if self._job is not None and self._commits:
            self._job.remove_after(filename)
        else:
            super().remove(filename)

    def poll(self) -> None:
        """Raise the error of a save that has failed, on every rank; every rank calls this at the end of each step."""
        if not self._under_way:
            return
        if self._ranks is None:
            if self._job is not None and self._job.ended():
                self.settle()
            return
        if self._pending_poll is not None and self._pending_poll():
            self.settle()
            return
        self._pending_poll = self._ranks.start_any(self._has_news())

    def _has_news(self) -> bool:
        """Return whether all ranks should settle: the save has ended, or this rank's part of it has failed."""
        job = self._job
        return job is not None and job.ended() and (self._commits or job.failure is not None)

    def settle(self) -> None:
        """Wait for the save under way, if there is one; if it has failed, raise its error on every rank."""
        if not self._under_way:
            return
        if self._pending_poll is not None:
            self._pending_poll()  # its exchange must end before the next collective begins
        self._under_way, self._pending_poll = False, None
        while not all(is_done for is_done, _ in self._gather_progress(REPORT_EVERY_S)):
            logger.debug("waiting for the checkpoint under way")
        job, self._job = self._job, None
        if job is not None and job.took_s is not None:
            self._took_s = job.took_s
        on_one_rank(self._backend, lambda: _raise_failure(job))

    def _gather_progress(self, wait_s: float) -> list[tuple[bool, str | None]]:
        """Wait up to `wait_s` for this rank's job; return (is done, failure) of every rank.

        If a rank has failed, this rank's job learns it and stops waiting for that rank's part.
        """
        job = self._job
        is_done = job is None or job.ended(max(0.0, wait_s))
        failure = None if job is None or job.failure is None else str(job.failure) or repr(job.failure)
        progress = by_rank(self._backend, lambda: (is_done, failure))
        failures = [text for _, text in progress if text is not None]
        if job is not None and failures:
            job.failure_elsewhere = failures[0]
        return progress

    def __enter__(self) -> "AsynchronousSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        job = self._job
        if job is None or (kind is not None and issubclass(kind, KeyboardInterrupt)):
            return
        if kind is not None:
            job.hurry()  # another rank may have died
        job.ended(None)
        if job.failure is not None:
            logger.warning("the last checkpoint was not saved: %s", job.failure)


def _raise_failure(job: Job | None) -> None:
    if job is not None and job.failure is not None:
        raise job.failure
