"""Report ranks that are slow, before they hang: which rank, on which host, and at which work.

All ranks wait for the slowest one, so steps or samples per second look equally slow on every rank. This module measures
only a rank's own work: the time for loading its data, and the time for computing its slots without the wait for the
gradients of other ranks.

*Contract*: `payload` returns the work of a rank since its last call; `receive` takes the work of all ranks. Both travel
with the losses, so they need no collective of their own. Once a window rank 0 reports each rank whose own work, for
each of its slots, took more than `FACTOR` times the median of the other ranks and cost the run at least `SHARE` of the
window. If a rank stays slow at the same work, a person sees that once and the log holds it for every window. The first
payload of a run is ignored, because everything starts and warms up in it.

Limits: on an accelerator the clock of the host measures when kernels are queued, not how long they run, so only loading
is compared there. The same holds for FSDP and for reduction="fast", whose waits are inside torch.

*Cost*: two clock reads for each step, and a few numbers beside the losses.
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
"""The fewest steps of a window, however long they take."""
LOADING, COMPUTING = "loading its data", "computing"


@dataclass
class Work:
    """The work of a rank in some steps, and the number of its slots."""

    host: str
    num_slots: int
    num_steps: int
    took_s: dict[str, float]
    """Seconds by activity: LOADING, and COMPUTING if it is known."""

    def __add__(self, other: "Work") -> "Work":
        took_s = {activity: seconds + other.took_s[activity] for activity, seconds in self.took_s.items()}
        return Work(self.host, self.num_slots, self.num_steps + other.num_steps, took_s)


@dataclass(frozen=True)
class Straggler:
    """A rank for which the other ranks wait, its slow activity, and the message about it."""

    rank: int
    activity: str
    text: str


class Stragglers:
    """The clocks of one rank, and on rank 0 the window with the work of all ranks.

    `loading_s()` and `waited_s()` return seconds since the start of the run. `waited_s` is the part of the steps in
    which this rank waited for others; None if that is not known. `tell` shows a message to a person.
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
        self._before = (0.0, 0.0)  # loading_s() and waited_s() at the last payload
        self._window: list[Work] = []
        self._window_began: float | None = None
        self._reported: set[tuple[int, str]] = set()

    def attach(self, engine: Engine) -> None:
        """Attach the clocks, before everything that may wait for other ranks at the end of a step."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin_step)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._end_step)

    def _begin_step(self) -> None:
        self._step_began = time.perf_counter()

    def _end_step(self) -> None:
        self._steps_s += time.perf_counter() - self._step_began
        self._num_steps += 1

    def payload(self) -> Work:
        """Return the work of this rank since the last call."""
        loading_s, waited_s = self._loading_s(), 0.0 if self._waited_s is None else self._waited_s()
        took_s = {LOADING: loading_s - self._before[0]}
        if self._waited_s is not None:
            took_s[COMPUTING] = self._steps_s - (waited_s - self._before[1])
        work = Work(self._host, self.num_slots, self._num_steps, took_s)
        self._before, self._steps_s, self._num_steps = (loading_s, waited_s), 0.0, 0
        return work

    def receive(self, by_rank: Sequence[Work]) -> None:
        """Add the work of all ranks to the window; report slow ranks at the end of the window, on rank 0."""
        now = time.perf_counter()
        if self.rank != 0:
            return
        if self._window_began is None:
            self._window_began = now
            return
        before = self._window
        self._window = [a + b for a, b in zip(before, by_rank, strict=True)] if before else list(by_rank)
        if now - self._window_began < self.window_s or self._window[0].num_steps < FEWEST_STEPS:
            return
        slow = find_stragglers(self._window, now - self._window_began)
        for straggler in slow:
            logger.warning("%s", straggler.text)
            if (straggler.rank, straggler.activity) not in self._reported:
                self.tell(straggler.text)
        self._reported = {(straggler.rank, straggler.activity) for straggler in slow}
        self._window, self._window_began = [], now


def find_stragglers(by_rank: Sequence[Work], window_s: float) -> list[Straggler]:
    """Return the ranks whose own work makes the other ranks wait, each with its slowest activity."""
    slot_s_by_rank = [{name: seconds / work.num_slots for name, seconds in work.took_s.items()} for work in by_rank]
    slow = []
    for rank, (work, slot_s) in enumerate(zip(by_rank, slot_s_by_rank, strict=True)):
        others = slot_s_by_rank[:rank] + slot_s_by_rank[rank + 1 :]
        if not others or not work.num_steps:
            continue
        own_s, usual_s = sum(slot_s.values()), median(sum(other.values()) for other in others)
        cost_s = (own_s - usual_s) * work.num_slots
        if own_s <= FACTOR * usual_s or cost_s < SHARE * window_s:
            continue
        usual_slot_s = {name: median(other[name] for other in others) for name in slot_s}
        activity = max(slot_s, key=lambda name: slot_s[name] - usual_slot_s[name])
        slow.append(Straggler(rank, activity, _message(rank, work, activity, slot_s, usual_slot_s)))
    return slow


def _message(
    rank: int, work: Work, activity: str, slot_s: Mapping[str, float], usual_slot_s: Mapping[str, float]
) -> str:
    def ms_a_step(seconds: float) -> str:
        return f"{seconds * work.num_slots / work.num_steps * 1000:,.1f} ms"

    times = f"{slot_s[activity] / usual_slot_s[activity]:.1f} times " if usual_slot_s[activity] > 0 else ""
    wait_s = sum(slot_s.values()) - sum(usual_slot_s.values())
    return (
        f"rank {rank} on {work.host} is slow: {activity} takes {ms_a_step(slot_s[activity])} a step, {times}the "
        f"others' {ms_a_step(usual_slot_s[activity])}; they wait {ms_a_step(wait_s)} a step for it"
    )
