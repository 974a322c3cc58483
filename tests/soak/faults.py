"""What chaos.py did to a run, how it saw the run train again, and the table of that."""

import statistics
from dataclasses import dataclass
from itertools import pairwise

from rich.box import MARKDOWN
from rich.table import Table

KINDS = ("worker", "server", "agent", "host", "link")
QUIET_S = 10.0
"""A fault after which the same ranks have trained for so long has not stopped them."""


@dataclass(frozen=True)
class Step:
    """A line that rank 0 has written at a step's end."""

    at: float
    life: str
    """Names the process: another one after every restart."""
    number: int
    world_size: int


@dataclass
class Fault:
    """What was done to the run, and what came of it."""

    kind: str
    host: str
    at: float
    life: str
    """The process that was rank 0 then."""
    lasts_s: float = 0.0
    again_s: float | None = None
    """Seconds until a step was completed again; the longest wait for one where the same ranks went on."""
    lost: int = 0
    """Steps that had to be done again."""
    stopped: bool = True

    def settle(self, steps: list[Step]) -> bool:
        """See whether the run trains again, by what it has told so far."""
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
    """Return what was done and what came of it, by kind of fault."""
    made = Table(box=MARKDOWN)
    for heading in (
        "fault",
        "times",
        "stopped the run",
        "s to train again: median",
        "max",
        "steps lost: median",
        "max",
    ):
        made.add_column(heading, justify="left" if heading == "fault" else "right")
    for kind in (*KINDS, "all"):
        some = [fault for fault in faults if kind in (fault.kind, "all")]
        stopped = [fault for fault in some if fault.stopped and fault.again_s is not None]
        took, lost = [fault.again_s or 0.0 for fault in stopped], [fault.lost for fault in stopped]
        cells = [f"{statistics.median(took):.1f}", f"{max(took):.1f}"] if stopped else ["", ""]
        cells += [f"{statistics.median(lost):g}", str(max(lost))] if stopped else ["", ""]
        made.add_row(kind, str(len(some)), str(len(stopped)), *cells)
    return made
