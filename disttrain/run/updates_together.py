"""The results and the outcome of several updates in a step, in the form in which a run takes those of one.

*Contract*: that of `SlotResults` and of `Updates`. The results of all updates of a step are there together, and the
step counts as left out if an update was.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from disttrain.engine import Engine, Events
from disttrain.engine.supervised import StepResult
from disttrain.handlers.values import KeptValues, keep
from disttrain.parallel import Layout
from disttrain.parallel.layout import norm_of_norms
from disttrain.precision import Precision
from disttrain.run.updates import Updates


class ResultsTogether:
    """The results of this rank's slots over the updates of a step, as `SlotResults` gives those of one update."""

    metrics = None

    def __init__(self, names: Sequence[str]) -> None:
        self._kept: dict[str, list[KeptValues]] = {name: [] for name in names}
        self._norms: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self.begin)

    def begin(self) -> None:
        for kept in self._kept.values():
            kept.clear()
        self._norms.clear()

    def of(self, name: str, x: Any, y: Any, result: StepResult, loss: Tensor) -> Tensor:
        """Take the result of a slot in one update; return its loss without its graph."""
        _, _, values = result
        named = {f"{name}/{key}": value for key, value in values.items()}
        self._kept[name].append(keep({f"{name}/loss": loss.detach(), **named}))
        return loss.detach()

    def norm_of(self, name: str, norm: Tensor | None) -> None:
        """Take the gradient's norm of one update."""
        if norm is not None:
            self._norms[name] = norm

    def take(self) -> list[KeptValues]:
        """Return the values of the newest step's slots, in slot order; an empty list if the step was left out."""
        due = [kept for kept in self._kept.values() if kept]
        together = []
        for of_slot in zip(*due, strict=True):
            numbers = {name: parts for kept in of_slot for name, parts in kept.numbers.items()}
            stacks = [stack for kept in of_slot for stack in kept.stacks]
            for name, norm in self._norms.items():
                numbers[f"{name}/grad_norm"] = [None]
                stacks.append(([(f"{name}/grad_norm", 0)], norm.detach().reshape(1)))
            together.append(KeptValues(numbers, stacks))
        self.begin()
        return together


class UpdatesTogether(Updates):
    """The updates of several optimizers in a step, in the form of `Updates`."""

    def __init__(self, by_name: Mapping[str, Updates], layout: Layout, seed: int, left_out: dict[int, str]) -> None:
        super().__init__(nn.Identity(), layout, None, seed=seed, on_nan="stop", grad_clip_norm=None, left_out=left_out)
        self._by_name = dict(by_name)
        self.follows_values = any(each.follows_values for each in by_name.values())
        self.monitor = next(iter(by_name.values())).monitor
        for each in by_name.values():
            each.before_update = self.before_update

    def begin(self, step: int) -> None:
        super().begin(step)
        for each in self._by_name.values():
            each.begin(step)

    def check_all(self) -> None:
        """Check the parameters as handlers see them, before any update shows its own alone."""
        for check in self.checks:
            check()

    def ends(self, due: Sequence[str]) -> None:
        """Take the outcome of the due updates of a step."""
        taken = {name: self._by_name[name].take() for name in due}
        norms = [norm for norm, _ in taken.values() if norm is not None]
        self.grad_norm = norm_of_norms(norms) if norms else None
        reasons = [f"{name}: {reason}" for name, (_, reason) in taken.items() if reason is not None]
        self._reason = "; ".join(reasons) or None
        self.stepped = any(self._by_name[name].stepped for name in due)

    def evaluated(self, values: Mapping[str, Any]) -> None:
        for each in self._by_name.values():
            each.evaluated(values)

    def follow(self, before: str | None, wanted: str | None) -> None:
        for each in self._by_name.values():
            each.follow(before, wanted)
        self.monitor = next(iter(self._by_name.values())).monitor


class States:
    """The states of several objects by name, as one object in a checkpoint."""

    def __init__(self, by_name: Mapping[str, Any]) -> None:
        self.by_name = {name: each for name, each in by_name.items() if each is not None}

    def state_dict(self) -> dict[str, Any]:
        return {name: each.state_dict() for name, each in self.by_name.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, each in self.by_name.items():
            each.load_state_dict(state[name])


class Precisions(States):
    """The precisions of several updates, each with a scaler of its own; an evaluation computes in the first."""

    def __init__(self, by_name: Mapping[str, Precision]) -> None:
        super().__init__(by_name)
        first = next(iter(by_name.values()))
        self.name, self.forward = first.name, first.forward
