"""The results of each slot of a step: its loss, and the values that the forward returned beside it.

*Contract*: the step body calls the object once for each slot of a step, in slot order; not for a rehearsal. `take`
returns what the slots of the newest step gave, once. What a step that failed has left is dropped.

*Cost*: an append for each slot; see `handlers/values.py`.
"""

from typing import Any

from torch import Tensor

from disttrain.engine import Engine, Events
from disttrain.engine.supervised import StepResult
from disttrain.handlers.values import KeptValues, keep

_NO_VALUES = KeptValues()


class SlotResults:
    """The results of this rank's slots in the newest step."""

    def __init__(self) -> None:
        self._values: list[KeptValues] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self._values.clear)

    def __call__(self, x: Any, y: Any, result: StepResult, loss: Tensor) -> Tensor:
        """Take the result of a slot; return the loss as the step's output, without its graph."""
        _, _, values = result
        self._values.append(keep(values) if values else _NO_VALUES)
        return loss.detach()

    def take(self) -> list[KeptValues]:
        """Return the values of the newest step's slots, in slot order; an empty list if no slot has any."""
        values = list(self._values) if any(kept.numbers for kept in self._values) else []
        self._values.clear()
        return values
