"""The faults that chaos.py causes in a run, the recovery of the run from each, and the table of them."""

import statistics
from dataclasses import dataclass
from itertools import pairwise

from rich.box import MARKDOWN
from rich.table import Table

KINDS = ("worker", "server", "agent", "host", "link")
QUIET_S = 10.0
"""If the same ranks have trained for so long after a fault, it has not stopped them."""


@dataclass(frozen=True)
class Step:
    """A line that rank 0 has written at the end of a step."""

    at: float
    life: str
    """The name of the process; it changes with every restart."""
    number: int
    world_size: int


@dataclass
class Fault:
    """A fault in the run, and its effect."""

    kind: str
    host: str
    at: float
    life: str
    """The process that was rank 0 at the time of the fault."""
    lasts_s: float = 0.0
    again_s: float | None = None
    """Seconds until the next completed step; if the same ranks went on, the longest time between two steps."""
    lost: int = 0
    """The number of steps that had to be repeated."""
    stopped: bool = True

    def settle(self, steps: list[Step]) -> bool:
        """Return whether the run trains again, from the steps written so far; if it does, set the effect."""
        after = [step for step in steps if step.at > self.at]
        others = [step for step in after if step.life != self.life]
        if others:
            before = max((step.number for step in steps if step.at < others[0].at), default=0)
            self.again_s, self.lost = others[0].at - self.at, max(0, before - others[0].number + 1)
        elif after and after[-1].at > self.at + self.lasts_s + QUIET_S:
            moments = [self.at, *(step.at for step in after)]
            self.again_s, self.stopped = max(b - a for a, b in pairwise(moments)), False
        return self.again_s is not None


def table(faults: list[Fault]) -> Table:
    """Return the table of the faults and their effects, by kind of fault."""
    rows = Table(box=MARKDOWN)
    for heading in (
        "fault",
        "times",
        "stopped the run",
        "s to train again: median",
        "max",
        "steps lost: median",
        "max",
    ):
        rows.add_column(heading, justify="left" if heading == "fault" else "right")
    for kind in (*KINDS, "all"):
        of_kind = [fault for fault in faults if kind in (fault.kind, "all")]
        stopped = [fault for fault in of_kind if fault.stopped and fault.again_s is not None]
        seconds, lost = [fault.again_s or 0.0 for fault in stopped], [fault.lost for fault in stopped]
        cells = [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"] if stopped else ["", ""]
        cells += [f"{statistics.median(lost):g}", str(max(lost))] if stopped else ["", ""]
        rows.add_row(kind, str(len(of_kind)), str(len(stopped)), *cells)
    return rows
