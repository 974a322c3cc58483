"""The newest whole evaluation of a run: its step, its results, and how many there were.

*Contract*: what follows evaluations (handlers of EVALUATED, a schedule of their results, early stopping) finds the same
before and after a kill. A checkpoint holds the newest evaluation if something in the run may follow it (`is_followed`);
a resumed run gets it back into `trainer.state`, and does not repeat it.
"""

from collections.abc import Mapping
from typing import Any

from disttrain.engine import State


class Evaluated:
    """The newest evaluation; before the first one its step is -1 and it has no results."""

    def __init__(self) -> None:
        self.step = -1
        self.number = 0
        """The evaluations of the run so far."""
        self.results: dict[str, Any] = {}
        self.is_followed = False

    def record(self, step: int, results: Mapping[str, Any]) -> None:
        """Take the results of a further evaluation."""
        self.step, self.number, self.results = step, self.number + 1, dict(results)

    def show(self, state: State) -> None:
        """Write the results into `state.metrics`, under "valid/NAME", and their number into `state.evaluations`."""
        state.metrics.update({f"valid/{name}": value for name, value in self.results.items()})
        state.evaluations = self.number

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "number": self.number, "results": self.results}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.number, self.results = state["step"], state["number"], dict(state["results"])
