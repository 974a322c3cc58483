"""Saving while the training goes on: copied on the training thread, written and committed by another.

*Contract*: a call returns when the state is copied, but for large tensors on the CPU whose names the caller's `later`
picks: nothing may change those until `copied()` has returned. What is written is that of the call's moment, the same
bytes as a `DirectorySaver` writes. One save is under way at a time: the next call waits for it. What is to be removed
goes only after the save that came before it is committed. No collective is ever called from the thread.

Every rank calls `poll` at each step's end: where a save has failed they all raise its error there, a step after it
was noticed. `settle` waits for the save under way and raises its error, on every rank. Leaving the context waits
too, without collectives, unless a KeyboardInterrupt said to stop at once.

*Cost*: memory for one copy of what this rank writes, kept from save to save. While a save is under way each `poll`
asks the ranks once, without waiting.
"""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from disttrain.checkpoint.agree import Ranks, by_rank, on_one_rank
from disttrain.checkpoint.directory_saver import DirectorySaver
from disttrain.checkpoint.jobs import Job, write_and_commit, write_noted
from disttrain.checkpoint.manifest import About
from disttrain.checkpoint.plan import Share
from disttrain.checkpoint.staging import Rest, Staging
from disttrain.checkpoint.tree import Flat
from disttrain.checkpoint.write import write_alone

logger = logging.getLogger(__name__)

TOLD_EVERY_S = 5.0
"""How often the ranks that wait for a save hear that it is still under way, so that none takes it for a hang."""


class AskingRanks(Ranks, Protocol):
    """The part of a `Backend` that `poll` needs, too."""

    def start_any(self, flag: bool, /) -> Callable[[], bool]:
        """Start to ask whether any rank says True."""


class AsynchronousSaver(DirectorySaver):
    """A `DirectorySaver` whose calls return when the state is copied; a context."""

    def __init__(
        self,
        dirname: str | Path,
        *,
        describe: Callable[[], About] = About,
        backend: AskingRanks | None = None,
        later: Callable[[str], bool] | None = None,
    ) -> None:
        super().__init__(dirname, describe=describe, backend=backend)
        self._ranks = backend
        self._job: Job | None = None
        self._under_way = False
        self._asked: Callable[[], bool] | None = None
        self._later = later
        self._staging = Staging()

    def __call__(self, checkpoint: Any, filename: str, metadata: Mapping[str, Any]) -> None:
        """Wait for the save under way, copy `checkpoint`, and start to save it."""
        step = self._step(filename)
        about = self._describe()
        self.settle()
        share = self._planner.share(step, checkpoint)
        if share.num_files == 1:
            on_one_rank(self._backend, lambda: self._start_alone(step, share, about))
        else:
            self._start_together(step, share, about)
        self._under_way = True

    def _start_alone(self, step: int, share: Share, about: About) -> None:
        copies, rest = self._staging.copied(share.flat.tensors, self._later)
        flat = Flat(share.flat.tree, copies)
        world_size = 1 if self._backend is None else self._backend.world_size

        def work(job: Job) -> None:
            job.copy(rest)
            self._clean()
            write_alone(self.place, step, flat, about, world_size)

        self._job = Job(work, super().remove)

    def _start_together(self, step: int, share: Share, about: About) -> None:
        """Copy this rank's part and start to write it; rank 0's thread waits for the others' and commits."""
        assert self._backend is not None
        rank, world_size = self._backend.rank, self._backend.world_size

        def begin() -> str:
            self._clean()
            return self.place.begin(step)

        upload = on_one_rank(self._backend, begin)
        rests: list[Rest] = []

        def copy() -> None:
            rests.append(self._staging.copied(share.flat.tensors, self._later)[1])

        try:
            by_rank(self._backend, copy)
        except BaseException:
            if rank == 0:
                self.place.abandon(upload)
            raise
        if rank >= share.num_files:
            return
        staged = share._replace(flat=Flat(share.flat.tree, self._staging.copies))
        if rank:
            self._job = Job(partial(write_noted, self.place, upload, staged, rank, rests[0]), super().remove)
        else:
            work = partial(write_and_commit, self.place, upload, step, staged, about, world_size, rests[0])
            self._job = Job(work, super().remove)

    def copied(self) -> None:
        """Return when all of the state is copied, on this rank; called before what is copied later is changed."""
        if (job := self._job) is not None:
            job.copied.wait()

    @property
    def under_way(self) -> bool:
        """Whether this rank's part of a save is still being written; what has to go after that does not count."""
        return self._job is not None and self._job.writes

    def expected_s(self) -> float | None:
        job = self._job
        if job is None or not job.writes:
            return job.took_s if job is not None and job.took_s is not None else self._took_s
        so_far_s = time.monotonic() - job.began
        took_s = max(so_far_s, self._took_s or 0.0)  # it takes at least as long as it has taken
        return took_s + (took_s - so_far_s)

    def abandon(self, within_s: float = 0.0) -> None:
        """Give what is under way that long to end, on every rank, and then no more: the process's end cuts it off."""
        if not self._under_way:
            return
        if self._asked is not None:
            self._asked()
            self._asked = None
        end = time.monotonic() + within_s
        late = False
        while not (late or all(over for over, _ in self._look_round(min(TOLD_EVERY_S, end - time.monotonic())))):
            late = any(by_rank(self._backend, lambda: time.monotonic() >= end))
        if not late:
            try:
                self.settle()
            except Exception as error:  # noqa: BLE001 - of whatever kind: it is no longer needed
                logger.warning("the save under way has failed: %s", error)
        elif self._job is not None:
            self._job.copied.wait()
            self._staging = Staging()  # that one's memory is still being written
        self._job, self._under_way = None, False

    def remove(self, filename: str) -> None:
        """Remove one checkpoint once the newest is committed."""
        if self._job is not None and self._writes:
            self._job.remove_after(filename)
        else:
            super().remove(filename)

    def poll(self) -> None:
        """Go on, or raise on every rank why the save under way has failed; called by all at each step's end."""
        if not self._under_way:
            return
        if self._ranks is None:
            if self._job is not None and self._job.ended():
                self.settle()
            return
        if self._asked is not None and self._asked():
            self.settle()
            return
        self._asked = self._ranks.start_any(self._told())

    def _told(self) -> bool:
        """Return whether this rank has something to say: the save has ended, or this rank's part of it has failed."""
        job = self._job
        return job is not None and job.ended() and (self._writes or job.failure is not None)

    def settle(self) -> None:
        """Wait for the save under way, if there is one, on every rank; raise on every rank why it has failed."""
        if not self._under_way:
            return
        if self._asked is not None:
            self._asked()  # what was asked is heard before anything else is
        self._under_way, self._asked = False, None
        while not all(over for over, _ in self._look_round()):
            logger.debug("waiting for the checkpoint under way")
        job, self._job = self._job, None
        if job is not None and job.took_s is not None:
            self._took_s = job.took_s
        on_one_rank(self._backend, lambda: _raise(job))

    def _look_round(self, wait_s: float = TOLD_EVERY_S) -> list[tuple[bool, str | None]]:
        """Return of every rank whether it is done, after waiting a while; let rank 0's job hear of a failed part."""
        job = self._job
        over = job is None or job.ended(max(0.0, wait_s))
        failure = None if job is None or job.failure is None else str(job.failure) or repr(job.failure)
        found = by_rank(self._backend, lambda: (over, failure))
        failures = [told for _, told in found if told is not None]
        if job is not None and failures:
            job.others = failures[0]
        return found

    def __enter__(self) -> "AsynchronousSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        job = self._job
        if job is None or (kind is not None and issubclass(kind, KeyboardInterrupt)):
            return
        if kind is not None:
            job.hurry()  # another rank may be no more
        job.ended(None)
        if job.failure is not None:
            logger.warning("the last checkpoint was not saved: %s", job.failure)


def _raise(job: Job | None) -> None:
    if job is not None and job.failure is not None:
        raise job.failure
