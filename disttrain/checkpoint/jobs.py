"""One save under way in the background: the thread that writes and commits, and the notes between the ranks' threads.

*Contract*: the thread never calls a collective. It leaves a note beside the part that it has written, or one with the
reason why it could not write it. The thread of rank 0 waits for the notes of all ranks and commits.
"""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from disttrain.checkpoint.manifest import CheckpointInfo, FileRecord
from disttrain.checkpoint.plan import Share
from disttrain.checkpoint.staging import CopyRest
from disttrain.checkpoint.store import CheckpointStore
from disttrain.checkpoint.write import commit, write_own_part
from disttrain.errors import CheckpointError

WAIT_FOR_NOTES_S = 600.0
"""The thread of rank 0 waits for the other parts at least this long after it has written its own, as large a part."""
HURRY_S = 10.0
"""It waits this long once the training has failed, for then a rank may have died."""
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.5
"""The thread of rank 0 reads the notes soon, and then less and less often: to read a remote store costs requests."""


class Job:
    """One save under way in this process: the whole state, or the part of one rank. A thread runs `work`.

    `remove` removes an old checkpoint by its name.
    """

    def __init__(self, work: Callable[["Job"], None], remove: Callable[[str], None]) -> None:
        self.failure: Exception | None = None
        self.failure_elsewhere: str | None = None
        """The reason why another rank's part will not come, if it is known."""
        self.patience_s = WAIT_FOR_NOTES_S
        self.copied = threading.Event()
        """Set when the caller may change its state."""
        self._work = work
        self._remove = remove
        self._to_remove: list[str] | None = []
        self._lock = threading.Lock()
        self.began = time.monotonic()
        self.took_s: float | None = None
        """The seconds that the save took; None until it has succeeded."""
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
            to_remove, self._to_remove = self._to_remove or [], None
        if self.failure is None:
            for name in to_remove:
                self._remove(name)

    def hurry(self) -> None:
        """Wait for the other parts only `HURRY_S`."""
        self.patience_s = HURRY_S

    def copy(self, copy_rest: CopyRest) -> None:
        """Copy the tensors that were left to be copied later; `work` calls this first."""
        try:
            copy_rest()
        finally:
            self.copied.set()

    def remove_after(self, name: str) -> None:
        """Remove an old checkpoint as soon as this save is committed; keep it if this save fails."""
        with self._lock:
            if self._to_remove is not None:
                self._to_remove.append(name)
                return
        if self.failure is None:
            self._remove(name)

    @property
    def is_writing(self) -> bool:
        """Whether the save has neither succeeded nor failed yet."""
        return self.took_s is None and self.failure is None

    def ended(self, wait_s: float | None = 0.0) -> bool:
        """Wait up to `wait_s` for the thread (None: without a limit); return whether it has ended."""
        self._thread.join(wait_s)
        return not self._thread.is_alive()


def write_and_note(store: CheckpointStore, upload: str, share: Share, rank: int, copy_rest: CopyRest, job: Job) -> None:
    """Write this rank's part; leave a note of it, or of the failure, for the rank that commits."""
    try:
        job.copy(copy_rest)
        note = {"record": write_own_part(store, upload, share, rank)}
    except Exception as error:
        with suppress(CheckpointError):  # if no note can be left either, `poll` reports the failure
            store.leave_note(upload, rank, json.dumps({"failure": str(error) or repr(error)}))
        raise
    store.leave_note(upload, rank, json.dumps(note))


def write_and_commit(
    store: CheckpointStore,
    upload: str,
    step: int,
    share: Share,
    info: CheckpointInfo,
    world_size: int,
    copy_rest: CopyRest,
    job: Job,
) -> None:
    """Write the part of rank 0, wait for the other parts, and commit; leave nothing if a part has failed."""
    try:
        job.copy(copy_rest)
        began = time.monotonic()
        own = FileRecord.model_validate(write_own_part(store, upload, share, 0))
        patience_s = 10 * (time.monotonic() - began)  # the other parts are as large
        others = _wait_for_others(store, upload, share.num_files, patience_s, job)
        commit(store, upload, step, share, info, world_size, [own, *others])
    except BaseException:
        store.abandon(upload)
        raise


def _wait_for_others(
    store: CheckpointStore, upload: str, num_files: int, patience_s: float, job: Job
) -> list[FileRecord]:
    """Return the records of the other ranks' parts, from their notes.

    CheckpointError if one of them has failed, or leaves no note for too long.
    """
    began, pause_s = time.monotonic(), FIRST_PAUSE_S
    while True:
        notes = store.notes(upload)
        records = {number: record for number, text in notes.items() if (record := _record_in(text)) is not None}
        missing = [number for number in range(1, num_files) if number not in records]
        if not missing:
            return [records[number] for number in range(1, num_files)]
        if job.failure_elsewhere is not None:
            raise CheckpointError(job.failure_elsewhere)
        waited_s = time.monotonic() - began
        if waited_s > (job.patience_s if job.patience_s <= HURRY_S else max(job.patience_s, patience_s)):
            raise CheckpointError(
                f"expected a note from each of the ranks {missing} when its part is written, got none within "
                f"{waited_s:.0f} s after rank 0 had written its part; read the logs of these ranks"
            )
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, LONGEST_PAUSE_S)


def _record_in(text: str) -> FileRecord | None:
    """Return the record in a note; None for an incomplete note, for some file systems of fsspec write in pieces."""
    try:
        note = json.loads(text)
    except ValueError:
        return None
    if "failure" in note:
        raise CheckpointError(note["failure"])
    return FileRecord.model_validate(note["record"])
