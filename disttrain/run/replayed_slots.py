"""The slots of one replayed step: the loss, the values and the gradient of each, and what is called before its forward.

*Contract*: nothing of the step changes. A rehearsal is not looked at. `only` one slot: the others do not run, and
`SlotDone` ends the step before its update.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from disttrain.data import SlotLoader
from disttrain.engine import Events
from disttrain.evidence.module_outputs import ModuleOutputs
from disttrain.run.state import Run


class SlotDone(BaseException):
    """Ends a step after the one slot of it that was wanted; no `Exception`, so that no code of a user catches it."""


@dataclass
class ReplayedSlot:
    """One slot of a step."""

    slot: int
    indices: list[int] | None = None
    """The indices of its samples; None for a stream, whose samples have none."""
    sources: list[str] | None = None
    """The source of each sample; None unless the order mixes sources."""
    weight: int | None = None
    """How often its loss counts; None without the config's `weight`."""
    loss: float | None = None
    grad_norm: float | None = None
    """2-norm of the gradient of its own loss, before it is weighted, summed over the slots and clipped."""
    values: dict[str, Any] = field(default_factory=dict)
    """The values that the forward returned beside the loss; a pair is (sum, weight)."""
    update: str | None = None
    """The update of the step that ran it; None unless the config has several."""


Before = Callable[[Run, int, Any], None]
"""(run, slot, microbatch), right before the slot's forward, whose generators are seeded already."""


class SlotWatcher:
    """Watches the slots of step `step` of a run; `outputs(step_function)` makes what records its modules."""

    def __init__(
        self,
        step: int,
        *,
        only: int | None = None,
        before: Before | None = None,
        outputs: Callable[[nn.Module], ModuleOutputs] | None = None,
    ) -> None:
        self.step = step
        self.only = only
        self.slots: list[ReplayedSlot] = []
        self._before = before
        self._make_outputs = outputs
        self._outputs: ModuleOutputs | None = None
        self._current: ReplayedSlot | None = None
        self._run: Run | None = None

    def attach(self, run: Run) -> None:
        """Watch the slots of this run."""
        self._run, self.slots = run, []
        for name, gradients in gradients_of(run).items():
            gradients.watch = partial(self._watched, name, gradients)
            gradients.module.register_forward_hook(self._returned)
        if self._make_outputs is not None:
            self._outputs = self._make_outputs(run.step_function)
        if self.only is not None or self._before is not None:
            run.trainer.add_event_handler(Events.ITERATION_STARTED, self._alone)

    def _alone(self) -> None:
        """Keep the end of one slot, and of a debugger, from the user's handlers of exceptions."""
        assert self._run is not None
        trainer = self._run.trainer
        for registration in trainer.registrations():
            if trainer.has_event_handler(registration.function, Events.EXCEPTION_RAISED):
                trainer.remove_event_handler(registration.function, Events.EXCEPTION_RAISED)

    def _watched(
        self, update: str | None, gradients: Any, microbatches: Iterator[Any], iteration: int
    ) -> Iterator[Any]:
        run = self._run
        assert run is not None
        ends = update is None or run.gradients.is_last(update, iteration)  # type: ignore[attr-defined]
        if iteration != self.step:
            yield from microbatches
            return
        slots = iter(run.slots.mine)
        for microbatch in microbatches:
            if gradients.rehearsing:
                if not ends or self.only in (None, run.slots.mine.start):
                    yield microbatch
                continue
            slot = next(slots)
            if self.only not in (None, slot):
                if not ends:  # an update that follows needs all of this one
                    yield microbatch
                continue
            self._current = ReplayedSlot(slot, update=update)
            self.slots.append(self._current)
            if self._before is not None:
                self._before(run, slot, microbatch)
            if self._outputs is not None:
                self._outputs.begin(slot)
            yield microbatch
            if self._outputs is not None:
                self._outputs.end()
            self._end(run, self._current)
            self._current = None
            if self.only is not None and ends:
                self._name_samples(run)
                raise SlotDone
        if ends:
            self._name_samples(run)

    def _returned(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self._current is not None:
            loss, _, values = output
            self._current.loss = float(loss.detach())
            self._current.values = {name: _number(value) for name, value in values.items()}

    def _end(self, run: Run, slot: ReplayedSlot) -> None:
        gradients = [each.grad for each in run.step_function.parameters() if each.grad is not None]
        precision = run.precision if slot.update is None else run.precision.by_name[slot.update]  # type: ignore[attr-defined]
        scaler = getattr(precision, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        slot.grad_norm = float(run.layout.total_norm(gradients)) / scale if gradients else 0.0

    def _name_samples(self, run: Run) -> None:
        """Add the samples and the weight of each slot; the loader has the next step's position already."""
        loader, weights = run.loader, run.weights
        for each in self.slots:
            each.weight = None if weights is None else weights[each.slot]
            if not isinstance(loader, SlotLoader):
                continue
            epoch, step = divmod(self.step - 1, len(loader))
            each.indices = list(loader.sampler.batch(epoch, step, each.slot))
            if (sources_of := getattr(loader.sampler.order, "sources_of", None)) is not None:
                each.sources = list(sources_of(each.indices))


def gradients_of(run: Run) -> dict[str | None, Any]:
    """Return the gradients of each update of a step by its name; those of the only one under None."""
    several: dict[str | None, Any] | None = getattr(run.gradients, "by_update", None)
    return {None: run.gradients} if several is None else several


def _number(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_number(each) for each in value]
    return value.tolist() if isinstance(value, Tensor) else value
