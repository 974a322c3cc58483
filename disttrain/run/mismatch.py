"""The error for a replayed step that has other bits than the run's ledger."""

from collections.abc import Sequence

from disttrain.errors import DisttrainError
from disttrain.evidence import LedgerDifference
from disttrain.run.replay_start import Start

UNEXPLAINED = (
    "Code and versions are those of the run, so look for data files that have changed, and for something that each "
    "process has for itself: `disttrain verify` finds out what"
)


class Mismatch(DisttrainError):
    """A replayed step that has other bits than the run's ledger."""

    def __init__(self, difference: LedgerDifference, begins: Start, reasons: Sequence[str]) -> None:
        num_same = difference.step - 1 - begins.step
        same = (
            f"steps {begins.step + 1} to {difference.step - 1} were" if num_same > 1 else f"step {begins.step + 1} was"
        )
        first = (
            f"it is the first step from {begins}" if difference.step > begins.step else f"it is the state of {begins}"
        )
        before = f"{same} the same" if num_same > 0 else first
        why = f"Other bits are to be expected: {'; '.join(reasons)}" if reasons else UNEXPLAINED
        super().__init__(
            f"step {difference.step} is not the run's: {difference.part}: expected {difference.left}, as the ledger "
            f"has it, got {difference.right}; {before}. {why}"
        )
        self.difference = difference
