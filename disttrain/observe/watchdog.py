"""A rank that makes no progress is stopped, and named: what it was doing, where, and who waited for it.

*Contract*: progress is loading a batch, computing a step, ending it (with evaluation, batch by batch, and saving). A
rank that makes none for `timeout_s` writes every thread's stack to `logs/rank-N.stacks.txt` and what torch remembers of
its collectives to `logs/rank-N.collectives.json`, tells what it knows in `logs/rank-N.hang.json`, reads what the others
tell there, reports one message to all ranks and ends its process: a thread that hangs cannot be woken. What the
launcher does then (restart or stop) is what it does when a rank dies.

*Errors*: HangError, printed once, by the rank whose report was first.

*Cost*: a thread that wakes a few times in `timeout_s`, and a clock read at a few events of each step.
"""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from disttrain.backend import Backend
from disttrain.engine import Engine, Events
from disttrain.errors import HangError
from disttrain.run_directory import write_text

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOKS_PER_TIMEOUT = 20
OTHERS_TELL_WITHIN_S = 2.0
FAILED = 1
SHOWN = 8
"""Of so many ranks the last collective is in the message."""
WAITS_IN = ("torch/distributed/", "torch/autograd/", "disttrain/backend/", "disttrain/parallel/")
"""What a rank is in that waits for others, inside any code of the user's: a collective, or a backward whose gradients
travel."""


@dataclass(frozen=True)
class Silence:
    """What one rank tells of its standstill."""

    rank: int
    host: str
    process: int
    doing: str
    since_s: float
    where: str
    waits: bool
    """Whether it seems to wait for other ranks."""
    collective: str = ""
    """Its last call to the others, whether that has ended, and how far the gradients of the newest step have met."""


class Watchdog:
    """Watches this rank from a thread of its own; a context, which ends the watching.

    `meeting()` says how far the gradients have met; `end(code)` ends the process.
    """

    def __init__(
        self,
        backend: Backend,
        timeout_s: float,
        logs: Path,
        *,
        meeting: Callable[[], str] | None = None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.backend = backend
        self.timeout_s = timeout_s
        self.logs = logs
        self._meeting = meeting
        self._end = end
        self._watched = threading.get_ident()
        self._doing, self._since = "starting", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="disttrain-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        for name in ("hang.json", "stacks.txt", "collectives.json"):
            self._file(self.backend.rank, name).unlink(missing_ok=True)
        self.progress("starting")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(self.timeout_s)

    def attach(self, engine: Engine) -> None:
        """Take every step's parts for progress; attached before what may hang, and so before everything else."""
        for event, doing in (
            (Events.GET_BATCH_STARTED, "loading the batch of step {}"),
            (Events.ITERATION_STARTED, "computing step {}"),
            (Events.ITERATION_COMPLETED, "ending step {}"),
            (Events.COMPLETED, "ending the run after step {}"),
        ):
            ahead = event is Events.GET_BATCH_STARTED
            engine.add_event_handler(event, self._note, doing, ahead)

    def _note(self, engine: Engine, doing: str, ahead: bool) -> None:
        self._doing, self._since = doing.format(engine.state.iteration + ahead), time.monotonic()

    def progress(self, doing: str) -> None:
        """Say what this rank begins to do now."""
        self._doing, self._since = doing, time.monotonic()

    def watched(self, batches: Iterable[T], doing: str) -> Iterator[T]:
        """Yield `batches`, each of which is progress."""
        for number, batch in enumerate(batches, start=1):
            self.progress(f"{doing}, batch {number}")
            yield batch

    def _watch(self) -> None:
        while not self._over.wait(self.timeout_s / LOOKS_PER_TIMEOUT):
            silent_s = time.monotonic() - self._since
            if silent_s >= self.timeout_s:
                self._stop(silent_s)
                return

    def _stop(self, silent_s: float) -> None:
        """Tell, hear the others, report, and end this process."""
        mine = self._silence(silent_s)
        recording = threading.Thread(target=self._record, name="disttrain-flight-record", daemon=True)
        recording.start()  # beside: a library that hangs may not answer
        try:
            with self._file(mine.rank, "stacks.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            write_text(self._file(mine.rank, "hang.json"), json.dumps(asdict(mine)))
        except OSError as refused:
            logger.error("what this rank was doing cannot be written: %s", refused)
        error = HangError(report(self._told(mine), self.backend.world_size, silent_s, self.logs))
        logger.error("%s", error)
        if self.backend.first_failure(wait_s=0.0) is None:
            self.backend.fail(error)
        first = self.backend.first_failure(wait_s=0.0)
        if first is None or first.rank == mine.rank:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(OTHERS_TELL_WITHIN_S)  # the reporter may need this rank, which may keep the store, for its words
        recording.join(OTHERS_TELL_WITHIN_S)
        self._end(FAILED)

    def _record(self) -> None:
        try:
            if (record := self.backend.flight_record()) is not None:
                self._file(self.backend.rank, "collectives.json").write_bytes(record)
        except (OSError, RuntimeError) as refused:
            logger.warning("what torch remembers of its collectives cannot be written: %s", refused)

    def _silence(self, silent_s: float) -> Silence:
        frames = list(_from_inside(sys._current_frames().get(self._watched)))
        theirs = next((i for i, f in enumerate(frames) if not _is_library(f.f_code.co_filename)), len(frames))
        outer = frames[theirs] if theirs < len(frames) else frames[0] if frames else None
        place = "" if outer is None else f"{outer.f_code.co_filename}:{outer.f_lineno} in {outer.f_code.co_name}"
        inside = [f.f_code.co_filename.replace(os.sep, "/") for f in frames[:theirs]]
        waits = any(part in name for name in inside for part in WAITS_IN)
        name = socket.gethostname()
        last, met = self.backend.last_contact, "" if self._meeting is None else self._meeting()
        said = [part for part in ("" if last is None else last.words(time.monotonic()), met) if part]
        return Silence(
            self.backend.rank, name, os.getpid(), self._doing, round(silent_s, 1), place, waits, "; ".join(said)
        )

    def _told(self, mine: Silence) -> list[Silence]:
        """Return what all ranks tell, by rank, after a moment for those that are as silent as this one."""
        found = {mine.rank: mine}
        until = time.monotonic() + OTHERS_TELL_WITHIN_S
        while len(found) < self.backend.world_size and time.monotonic() < until:
            time.sleep(OTHERS_TELL_WITHIN_S / LOOKS_PER_TIMEOUT)
            for rank in set(range(self.backend.world_size)) - set(found):
                try:
                    found[rank] = Silence(**json.loads(self._file(rank, "hang.json").read_text(encoding="utf-8")))
                except (OSError, ValueError, TypeError):
                    continue  # not told, or not yet
        return [found[rank] for rank in sorted(found)]

    def _file(self, rank: int, name: str) -> Path:
        return self.logs / f"rank-{rank}.{name}"


def report(told: Sequence[Silence], world_size: int, silent_s: float, logs: Path) -> str:
    """Return the message: who stands still, doing what and where, and who waits for whom."""
    stuck = [s for s in told if not s.waits]
    unheard = sorted(set(range(world_size)) - {s.rank for s in told})
    parts = [f"rank {s.rank} (process {s.process} on {s.host}) is {s.doing}, at {s.where}" for s in stuck]
    if unheard:
        parts.append(f"{_ranks(unheard)} did not answer: stopped, cut off, or busy in a library")
    waiting = [s for s in told if s.waits]
    if waiting and parts:
        parts.append(f"{_ranks([s.rank for s in waiting])} {'waits' if len(waiting) == 1 else 'wait'} for it")
    elif waiting:
        doing = "; ".join(dict.fromkeys(f"{s.doing}, at {s.where}" for s in waiting))
        parts.append(f"all ranks wait for each other ({doing}): do all call the same collectives?")
    last = [f"rank {s.rank}: {s.collective}" for s in told if s.collective and world_size > 1]
    more = [f"and {len(last) - SHOWN} more in {logs}/rank-*.hang.json"] if len(last) > SHOWN else []
    calls = f" Last collectives: {'. '.join(last[:SHOWN] + more)}." if last else ""
    return (
        f"no progress for {silent_s:.0f} s: {'; '.join(parts)}.{calls} All stacks are in {logs}/rank-*.stacks.txt; "
        "if it only needs longer, raise timeout_s"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _from_inside(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_library(name: str) -> bool:
    """Return whether code of this file is torch's, Python's or our own, rather than the user's."""
    path = name.replace(os.sep, "/")
    ours = Path(name).is_relative_to(Path(__file__).parents[1])
    return ours or "/site-packages/" in path or "/lib/python3" in path or path.startswith("<")
