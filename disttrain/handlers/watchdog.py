"""Stop a rank that makes no progress, and report it: its activity, its place in the code, and the ranks that wait.

*Contract*: progress is the loading of a batch, the computing of a step, and its end (with each batch of an evaluation,
and with saving). A rank that makes no progress for `timeout_s`

- writes the stacks of all its threads to `logs/rank-N.stacks.txt`;
- writes torch's record of its collectives to `logs/rank-N.collectives.json`;
- writes its own report to `logs/rank-N.hang.json`, and reads the reports of the other ranks;
- sends one message to all ranks;
- ends its process, because nothing can wake a thread that hangs.

Then the launcher restarts or stops, as it does when a rank dies.

*Errors*: HangError, printed once, by the rank that failed first.

*Cost*: a thread that wakes `CHECKS_PER_TIMEOUT` times in `timeout_s`, and a clock read at a few events of each step.
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
from disttrain.files import write_text
from disttrain.pod import note_end

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHECKS_PER_TIMEOUT = 20
REPORTS_WITHIN_S = 2.0
"""How long a rank waits for the reports of the others, and then for the rank that prints the message."""
_EXIT_CODE = 1
NUM_COLLECTIVES = 8
"""The most ranks whose last collective is in the message."""
WAITS_IN = ("torch/distributed/", "torch/autograd/", "disttrain/backend/", "disttrain/parallel/")
"""Code in which a rank waits for others: a collective, or a backward that exchanges gradients."""


@dataclass(frozen=True)
class HangReport:
    """The report of one rank that makes no progress; `logs/rank-N.hang.json` holds these fields."""

    rank: int
    host: str
    process: int
    doing: str
    since_s: float
    where: str
    """The file, line and function of the user's code."""
    waits: bool
    """True if it seems to wait for other ranks."""
    collective: str = ""
    """Its last collective, whether that has ended, and the progress of the newest step's gradients."""


class Watchdog:
    """A context in which a thread watches the progress of this rank.

    `meeting()` returns the progress of the gradients that the ranks sum, in words; `end(code)` ends the process.
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
        self._watched_thread = threading.get_ident()
        self._doing, self._since = "starting", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="disttrain-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        for name in ("hang.json", "stacks.txt", "collectives.json"):
            self._file(self.backend.rank, name).unlink(missing_ok=True)
        self.progress("starting")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(self.timeout_s)

    def attach(self, engine: Engine) -> None:
        """Count the parts of every step as progress; attach this before everything that may hang."""
        for event, doing in (
            (Events.GET_BATCH_STARTED, "loading the batch of step {}"),
            (Events.ITERATION_STARTED, "computing step {}"),
            (Events.ITERATION_COMPLETED, "ending step {}"),
            (Events.COMPLETED, "ending the run after step {}"),
        ):
            is_before_step = event is Events.GET_BATCH_STARTED
            engine.add_event_handler(event, self._begin_part, doing, is_before_step)

    def _begin_part(self, engine: Engine, doing: str, is_before_step: bool) -> None:
        self.progress(doing.format(engine.state.iteration + is_before_step))

    def progress(self, doing: str) -> None:
        """Record the activity that this rank begins now."""
        self._doing, self._since = doing, time.monotonic()

    def watched(self, batches: Iterable[T], doing: str) -> Iterator[T]:
        """Yield `batches`, and count each of them as progress."""
        for number, batch in enumerate(batches, start=1):
            self.progress(f"{doing}, batch {number}")
            yield batch

    def _watch(self) -> None:
        while not self._ended.wait(self.timeout_s / CHECKS_PER_TIMEOUT):
            stalled_s = time.monotonic() - self._since
            if stalled_s >= self.timeout_s:
                self._stop(stalled_s)
                return

    def _stop(self, stalled_s: float) -> None:
        """Write this rank's report, read the others', print one message, and end this process."""
        mine = self._report(stalled_s)
        recording = threading.Thread(target=self._record, name="disttrain-flight-record", daemon=True)
        recording.start()  # in a thread of its own: a library that hangs may not return
        try:
            with self._file(mine.rank, "stacks.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            write_text(self._file(mine.rank, "hang.json"), json.dumps(asdict(mine)))
        except OSError as write_error:
            logger.error("the report of this rank cannot be written: %s", write_error)
        error = HangError(hang_message(self._all_reports(mine), self.backend.world_size, stalled_s, self.logs))
        logger.error("%s", error)
        if self.backend.first_failure(wait_s=0.0) is None:
            self.backend.fail(error)
        first = self.backend.first_failure(wait_s=0.0)
        if first is None or first.rank == mine.rank:
            note_end(text := f"{type(error).__name__}: {error}")
            print(text, file=sys.stderr, flush=True)
        else:
            time.sleep(REPORTS_WITHIN_S)  # the rank that prints may need the store, which may be in this process
        recording.join(REPORTS_WITHIN_S)
        self._end(_EXIT_CODE)

    def _record(self) -> None:
        try:
            if (record := self.backend.flight_record()) is not None:
                self._file(self.backend.rank, "collectives.json").write_bytes(record)
        except (OSError, RuntimeError) as error:
            logger.warning("torch's record of its collectives cannot be written: %s", error)

    def _report(self, stalled_s: float) -> HangReport:
        frames = list(_innermost_first(sys._current_frames().get(self._watched_thread)))
        num_inside = next((i for i, f in enumerate(frames) if not _is_library(f.f_code.co_filename)), len(frames))
        users = frames[num_inside] if num_inside < len(frames) else frames[0] if frames else None
        place = "" if users is None else f"{users.f_code.co_filename}:{users.f_lineno} in {users.f_code.co_name}"
        inside = [f.f_code.co_filename.replace(os.sep, "/") for f in frames[:num_inside]]
        contact = self.backend.last_contact
        collective = ["" if contact is None else contact.words(time.monotonic())]
        collective += [] if self._meeting is None else [self._meeting()]
        return HangReport(
            rank=self.backend.rank,
            host=socket.gethostname(),
            process=os.getpid(),
            doing=self._doing,
            since_s=round(stalled_s, 1),
            where=place,
            waits=any(part in name for name in inside for part in WAITS_IN),
            collective="; ".join(filter(None, collective)),
        )

    def _all_reports(self, mine: HangReport) -> list[HangReport]:
        """Return the reports by rank, after a moment for ranks that stop at the same time as this one."""
        reports = {mine.rank: mine}
        deadline = time.monotonic() + REPORTS_WITHIN_S
        while len(reports) < self.backend.world_size and time.monotonic() < deadline:
            time.sleep(REPORTS_WITHIN_S / CHECKS_PER_TIMEOUT)
            for rank in set(range(self.backend.world_size)) - set(reports):
                try:
                    reports[rank] = HangReport(**json.loads(self._file(rank, "hang.json").read_text(encoding="utf-8")))
                except (OSError, ValueError, TypeError):
                    continue  # there is no report, or not yet
        return [reports[rank] for rank in sorted(reports)]

    def _file(self, rank: int, name: str) -> Path:
        return self.logs / f"rank-{rank}.{name}"


def hang_message(reports: Sequence[HangReport], world_size: int, stalled_s: float, logs: Path) -> str:
    """Return the message: the ranks that hang, their activities and places in the code, and the ranks that wait."""
    stuck = [s for s in reports if not s.waits]
    missing = sorted(set(range(world_size)) - {s.rank for s in reports})
    parts = [f"rank {s.rank} (process {s.process} on {s.host}) is {s.doing}, at {s.where}" for s in stuck]
    if missing:
        parts.append(f"{_ranks(missing)} did not answer: stopped, cut off, or busy in a library")
    waiting = [s for s in reports if s.waits]
    if waiting and parts:
        parts.append(f"{_ranks([s.rank for s in waiting])} {'waits' if len(waiting) == 1 else 'wait'} for it")
    elif waiting:
        doing = "; ".join(dict.fromkeys(f"{s.doing}, at {s.where}" for s in waiting))
        parts.append(f"all ranks wait for each other ({doing}): do all call the same collectives?")
    calls = [f"rank {s.rank}: {s.collective}" for s in reports if s.collective and world_size > 1]
    if len(calls) > NUM_COLLECTIVES:
        calls[NUM_COLLECTIVES:] = [f"and {len(calls) - NUM_COLLECTIVES} more in {logs}/rank-*.hang.json"]
    last_collectives = f" Last collectives: {'. '.join(calls)}." if calls else ""
    return (
        f"no progress for {stalled_s:.0f} s: {'; '.join(parts)}.{last_collectives} All stacks are in "
        f"{logs}/rank-*.stacks.txt; if it only needs longer, raise timeout_s"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _innermost_first(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_library(name: str) -> bool:
    """Return True if the file `name` is disttrain's, torch's, another library's or Python's, and not the user's."""
    path = name.replace(os.sep, "/")
    is_ours = Path(name).is_relative_to(Path(__file__).parents[1])
    return is_ours or "/site-packages/" in path or "/lib/python3" in path or path.startswith("<")
