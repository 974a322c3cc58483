"""Ranks that are slow, named before they become hangs: which, where, and at what.

All ranks wait for the slowest, so in steps and samples per second every rank looks as slow as that one. Told apart are
the times of a rank's own work: loading its data, and computing its slots without the wait for others' gradients.

*Contract*: `say` gives what a rank did since it last said so, `hear` takes what all ranks said; both travel with the
losses, so that they cost no collective of their own. Once a window rank 0 names each rank whose own work took more than
`FACTOR` times the others' median, for each of its slots, and cost the run at least `SHARE` of the window. A rank that
stays slow at the same thing is told to a person once and logged in every window. The first word of a run, in which
everything starts and warms up, does not count.

What is not measured: on an accelerator a host's clock tells when kernels were queued, not how long they ran, so only
loading is compared there; the same with FSDP and reduction="fast", whose waits lie inside torch.

*Cost*: two clock reads a step, and a few numbers beside the losses.
"""

import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from disttrain.engine import Engine, Events

logger = logging.getLogger(__name__)

FACTOR = 1.5
SHARE = 0.1
FEWEST_STEPS = 10
"""A window has at least so many steps, however long they take."""
LOADING, COMPUTING = "loading its data", "computing"


@dataclass
class Work:
    """What a rank did in a window, and with how many slots."""

    host: str
    num_slots: int
    num_steps: int
    took_s: dict[str, float]
    """By what it did: LOADING, COMPUTING if that is known."""

    def __add__(self, other: "Work") -> "Work":
        took_s = {what: seconds + other.took_s[what] for what, seconds in self.took_s.items()}
        return Work(self.host, self.num_slots, self.num_steps + other.num_steps, took_s)


@dataclass(frozen=True)
class Straggler:
    """A rank that the others wait for."""

    rank: int
    what: str
    text: str


class Stragglers:
    """One rank's clocks, and on rank 0 what all say; `loading_s()` and `waited_s()` count since the start.

    `waited_s` is the part of the steps in which this rank waited for others, None where that is not known. `tell` takes
    a line for a person.
    """

    def __init__(
        self,
        rank: int,
        num_slots: int,
        *,
        loading_s: Callable[[], float],
        waited_s: Callable[[], float] | None,
        window_s: float,
        tell: Callable[[str], object],
    ) -> None:
        self.rank = rank
        self.num_slots = num_slots
        self.window_s = window_s
        self.tell = tell
        self._host = socket.gethostname()
        self._loading_s = loading_s
        self._waited_s = waited_s
        self._steps_s = 0.0
        self._num_steps = 0
        self._step_began = 0.0
        self._said = (0.0, 0.0)
        self._window: list[Work] = []
        self._began: float | None = None
        self._named: set[tuple[int, str]] = set()

    def attach(self, engine: Engine) -> None:
        """Attached before whatever may wait for other ranks at a step's end."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._starts)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._ends)

    def _starts(self) -> None:
        self._step_began = time.perf_counter()

    def _ends(self) -> None:
        self._steps_s += time.perf_counter() - self._step_began
        self._num_steps += 1

    def say(self) -> Work:
        """Return what this rank did since it last said so."""
        loading_s, waited_s = self._loading_s(), 0.0 if self._waited_s is None else self._waited_s()
        took_s = {LOADING: loading_s - self._said[0]}
        if self._waited_s is not None:
            took_s[COMPUTING] = self._steps_s - (waited_s - self._said[1])
        work = Work(self._host, self.num_slots, self._num_steps, took_s)
        self._said, self._steps_s, self._num_steps = (loading_s, waited_s), 0.0, 0
        return work

    def hear(self, by_rank: Sequence[Work]) -> None:
        """Take what all ranks did; at a window's end name those that are slow."""
        now = time.perf_counter()
        if self.rank != 0:
            return
        if self._began is None:
            self._began = now
            return
        before = self._window
        self._window = [a + b for a, b in zip(before, by_rank, strict=True)] if before else list(by_rank)
        if now - self._began < self.window_s or self._window[0].num_steps < FEWEST_STEPS:
            return
        found = stragglers(self._window, now - self._began)
        for straggler in found:
            logger.warning("%s", straggler.text)
            if (straggler.rank, straggler.what) not in self._named:
                self.tell(straggler.text)
        self._named = {(straggler.rank, straggler.what) for straggler in found}
        self._window, self._began = [], now


def stragglers(by_rank: Sequence[Work], window_s: float) -> list[Straggler]:
    """Return the ranks whose own work holds the others up, and at what."""
    each = [{what: seconds / work.num_slots for what, seconds in work.took_s.items()} for work in by_rank]
    found = []
    for rank, (work, mine) in enumerate(zip(by_rank, each, strict=True)):
        others = each[:rank] + each[rank + 1 :]
        if not others or not work.num_steps:
            continue
        own, usual = sum(mine.values()), median(sum(other.values()) for other in others)
        cost_s = (own - usual) * work.num_slots
        if own <= FACTOR * usual or cost_s < SHARE * window_s:
            continue
        usual_of = {what: median(other[what] for other in others) for what in mine}
        what = max(mine, key=lambda name: mine[name] - usual_of[name])
        found.append(Straggler(rank, what, _text(rank, work, what, mine, usual_of)))
    return found


def _text(rank: int, work: Work, what: str, mine: Mapping[str, float], usual: Mapping[str, float]) -> str:
    def ms(slot_s: float) -> str:
        return f"{slot_s * work.num_slots / work.num_steps * 1000:,.1f} ms"

    times = f"{mine[what] / usual[what]:.1f} times " if usual[what] > 0 else ""
    waits = sum(mine.values()) - sum(usual.values())
    return (
        f"rank {rank} on {work.host} is slow: {what} takes {ms(mine[what])} a step, {times}the others' "
        f"{ms(usual[what])}; they wait {ms(waits)} a step for it"
    )
