"""The results of each slot of a step: its loss, and the values that the forward returned beside it.

*Contract*: the step body calls the object once for each slot of a step, in slot order; not for a rehearsal. `take`
returns what the slots of the newest step gave, once. What a step that failed has left is dropped.

In an audited step the outputs are held back until its slots have been found right: the step may be done again.

*Cost*: an append for each slot; see `handlers/values.py` and `train_metrics.py`.
"""

from typing import Any

from torch import Tensor

from disttrain.engine import Engine, Events
from disttrain.engine.supervised import StepResult
from disttrain.handlers.values import KeptValues, keep
from disttrain.run.train_metrics import TrainMetrics

_NO_VALUES = KeptValues()


class SlotResults:
    """The results of this rank's slots in the newest step; `metrics` are updated with the outputs of each slot."""

    def __init__(self, metrics: TrainMetrics | None = None) -> None:
        self.metrics = metrics
        self._values: list[KeptValues] = []
        self._held: list[Any] | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin)

    def _begin(self) -> None:
        self._values.clear()
        self._held = None

    def hold(self) -> None:
        """Forget the results of this step so far, and hold its outputs back from the metrics until `release`."""
        self._values.clear()
        self._held = []

    def release(self) -> None:
        """Update the metrics with the outputs that were held back."""
        held, self._held = self._held or [], None
        if self.metrics is not None:
            for number, outputs in enumerate(held):
                self.metrics.update(number, outputs)

    def __call__(self, x: Any, y: Any, result: StepResult, loss: Tensor) -> Tensor:
        """Take the result of a slot; return the loss as the step's output, without its graph."""
        _, outputs, values = result
        if self._held is not None:
            self._held.append(outputs)
        elif self.metrics is not None:
            self.metrics.update(len(self._values), outputs)
        self._values.append(keep(values) if values else _NO_VALUES)
        return loss.detach()

    def take(self) -> list[KeptValues]:
        """Return the values of the newest step's slots, in slot order; an empty list if no slot has any."""
        values = list(self._values) if any(kept.numbers for kept in self._values) else []
        self._values.clear()
        return values
