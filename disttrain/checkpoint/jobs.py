"""One save that is under way: the thread that writes and commits, and how the ranks' threads hear of each other.

*Contract*: no collective is ever called from such a thread. Each leaves a note beside the part that it has written, or
of why it could not; rank 0's waits for the notes and commits.
"""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from disttrain.checkpoint.manifest import About, FileRecord
from disttrain.checkpoint.place import Place
from disttrain.checkpoint.plan import Share
from disttrain.checkpoint.staging import Rest
from disttrain.checkpoint.write import commit, write_mine
from disttrain.errors import CheckpointError

PATIENCE_S = 600.0
"""How long rank 0's thread waits at least for the others' parts, once its own, which is as large, is written."""
HURRY_S = 10.0
"""How long once the training has failed: a rank may have died."""
LOOKED_AFTER_S = 0.02
LOOKED_EVERY_S = 0.5
"""Rank 0's thread looks for word of the others soon, then ever more seldom: a store is asked by requests."""


class Job:
    """One save under way in this process: all of it, one rank's part, or that of the rank that commits."""

    def __init__(self, work: Callable[["Job"], None], remove: Callable[[str], None]) -> None:
        self.failure: Exception | None = None
        self.others: str | None = None
        """Why another rank's part will not come, if that is known."""
        self.patience_s = PATIENCE_S
        self.copied = threading.Event()
        """Set when the state is no longer needed."""
        self._work = work
        self._remove = remove
        self._doomed: list[str] | None = []
        self._lock = threading.Lock()
        self.began = time.monotonic()
        self.took_s: float | None = None
        """How long it took, once it has ended well."""
        self._thread = threading.Thread(target=self._run, name="disttrain-checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work(self)
        except Exception as error:  # noqa: BLE001 - kept for the training thread, which raises it
            self.failure = error
            self.copied.set()
        else:
            self.took_s = time.monotonic() - self.began
        with self._lock:
            doomed, self._doomed = self._doomed or [], None
        if self.failure is None:
            for name in doomed:
                self._remove(name)

    def hurry(self) -> None:
        """Wait for the others' parts no longer than a moment."""
        self.patience_s = HURRY_S

    def copy(self, rest: Rest) -> None:
        """Copy what was left to be copied later; first thing in its work."""
        try:
            rest()
        finally:
            self.copied.set()

    def remove_after(self, name: str) -> None:
        """Remove an old checkpoint as soon as this one is committed, and not if it fails."""
        with self._lock:
            if self._doomed is not None:
                self._doomed.append(name)
                return
        if self.failure is None:
            self._remove(name)

    @property
    def writes(self) -> bool:
        """Whether the save is neither committed nor has failed."""
        return self.took_s is None and self.failure is None

    def ended(self, wait_s: float | None = 0.0) -> bool:
        """Return whether it is over, after waiting for that."""
        self._thread.join(wait_s)
        return not self._thread.is_alive()


def write_noted(place: Place, upload: str, share: Share, rank: int, rest: Rest, job: Job) -> None:
    """Write a part and leave word of it, or of why it could not be written, for the rank that commits."""
    try:
        job.copy(rest)
        note = {"record": write_mine(place, upload, share, rank)}
    except Exception as error:
        with suppress(CheckpointError):  # where none can be left, `poll` tells
            place.leave_note(upload, rank, json.dumps({"failure": str(error) or repr(error)}))
        raise
    place.leave_note(upload, rank, json.dumps(note))


def write_and_commit(
    place: Place, upload: str, step: int, share: Share, about: About, world_size: int, rest: Rest, job: Job
) -> None:
    """Write rank 0's part, wait for word of the others', and commit; leave nothing where one has failed."""
    try:
        job.copy(rest)
        began = time.monotonic()
        own = FileRecord.model_validate(write_mine(place, upload, share, 0))
        patient_s = 10 * (time.monotonic() - began)  # the others' parts are as large
        others = _word_of_others(place, upload, share.num_files, patient_s, job)
        commit(place, upload, step, share, about, world_size, [own, *others])
    except BaseException:
        place.abandon(upload)
        raise


def _word_of_others(place: Place, upload: str, num_files: int, patient_s: float, job: Job) -> list[FileRecord]:
    """Return what the other ranks have written, as they say; CheckpointError where one has failed or says nothing."""
    began, pause_s = time.monotonic(), LOOKED_AFTER_S
    while True:
        notes = place.notes(upload)
        records = {number: record for number, text in notes.items() if (record := _noted(text)) is not None}
        missing = [number for number in range(1, num_files) if number not in records]
        if not missing:
            return [records[number] for number in range(1, num_files)]
        if job.others is not None:
            raise CheckpointError(job.others)
        waited_s = time.monotonic() - began
        if waited_s > (job.patience_s if job.patience_s <= HURRY_S else max(job.patience_s, patient_s)):
            raise CheckpointError(
                f"no word of the parts that the ranks {missing} write, {waited_s:.0f} s after rank 0's was written; "
                "see their logs"
            )
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, LOOKED_EVERY_S)


def _noted(text: str) -> FileRecord | None:
    """Return what a note says; None for the beginning of one: not every file system of fsspec's writes all at once."""
    try:
        note = json.loads(text)
    except ValueError:
        return None
    if "failure" in note:
        raise CheckpointError(note["failure"])
    return FileRecord.model_validate(note["record"])
