"""Metrics of the training data: over the outputs of all slots since the last log point.

*Contract*: each slot of the run has metrics of its own, which are updated with the slot's outputs in each step of a
window. At a log point the states of all slots are merged in slot order, as torchmetrics merges those of ranks, and
every rank computes the same value. So it has the same bits on any number of ranks, sums of floats too. The step alone
decides where a window ends: after each `log.every_steps` steps, and at the end of each epoch. A checkpoint inside a
window holds the states of all slots, so neither a kill nor a resume on other ranks changes a value. The last step of a
run has a value too; if it is no log point the window stays open, for a run that is made longer.

*Errors*: ConfigError for a forward without outputs.

*Cost*: torchmetrics' `update` for each slot, and a state for each of this rank's slots. At a log point one copy of the
states to the host, which travels with the losses. A checkpoint inside a window gathers them too.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from disttrain.backend import Backend
from disttrain.engine.step_defaults import to_device
from disttrain.errors import ConfigError
from disttrain.parallel import Slots
from disttrain.run.evaluation import plain_value, update_metric

if TYPE_CHECKING:
    from torchmetrics import Metric

logger = logging.getLogger(__name__)

SlotState = dict[str, dict[str, Any]]
"""Of one slot: {"states": {"NAME/PART/STATE": tensor or list of tensors}, "counts": {"NAME/PART": updates}}."""


class TrainMetrics:
    """The metrics of this rank's slots, by name; `metrics` are new ones, and there may be none.

    `described` is the declaration of the metrics in plain values. A window that was begun with another one is dropped.
    `bring_together` lays outputs whole on each device of this rank.
    """

    def __init__(
        self,
        metrics: Mapping[str, "Metric"],
        slots: Slots,
        backend: Backend,
        *,
        described: Mapping[str, Any] | None = None,
        bring_together: Callable[[Any], Any] = lambda outputs: outputs,
    ) -> None:
        for metric in metrics.values():
            for part in _parts(metric).values():
                part.distributed_available_fn = _never  # the states of slots are merged here, and no others
        self._slots = slots
        self._backend = backend
        self._described = dict(described or {})
        self._bring_together = bring_together
        self._of_slots: list[dict[str, Metric]] = [copy.deepcopy(dict(metrics)) for _ in slots.mine]

    def update(self, index: int, outputs: Any) -> None:
        """Update the metrics of the slot that is number `index` of this rank's with the outputs of its forward."""
        if outputs is None:
            raise ConfigError(
                "train_metrics: expected outputs of the forward, with which the metrics can be updated, got None; "
                "return (loss, outputs) with a tuple as outputs, such as (scores, labels)"
            )
        outputs = self._bring_together(tree_map_only(Tensor, Tensor.detach, outputs))
        self._backend.flush()
        outputs = to_device(outputs, self._backend.metrics_device)
        for metric in self._of_slots[index].values():
            update_metric(metric, outputs)

    @property
    def window_is_open(self) -> bool:
        """Whether the metrics have been updated since the last window; the same on every rank."""
        return any(any(_counts(metrics).values()) for metrics in self._of_slots)

    def states(self) -> list[SlotState]:
        """Return copies of the states of this rank's slots, on the host."""
        return [
            {"states": {key: _on_host(state) for key, _, state in _states(metrics)}, "counts": _counts(metrics)}
            for metrics in self._of_slots
        ]

    def values(self, of_slots: Sequence[SlotState]) -> dict[str, Any]:
        """Return the values over all slots, whose states are in slot order; None where nothing has been updated."""
        updated = [each for each in of_slots if any(each["counts"].values())]
        # A copy of a metric that may have been updated: update() sets more than states in some.
        return {name: _value(name, copy.deepcopy(metric), updated) for name, metric in self._of_slots[0].items()}

    def begin_window(self) -> None:
        """Forget the outputs up to now."""
        for metrics in self._of_slots:
            for metric in metrics.values():
                metric.reset()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of an open window for all slots, the same on every rank; every rank calls this."""
        if not self.window_is_open:
            return {}
        of_slots = [each for of_rank in self._backend.all_gather(self.states()) for each in of_rank]
        return {"described": self._described, "of_slots": of_slots}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the window of a checkpoint, on any number of ranks; one of other metrics begins anew."""
        self.begin_window()
        if not state:
            return
        keys = {key for key, _, _ in _states(self._of_slots[0])}
        if state["described"] != self._described or keys != state["of_slots"][0]["states"].keys():
            logger.warning("train_metrics are others than in the checkpoint: their first values are of fewer steps")
            return
        for slot, metrics in zip(self._slots.mine, self._of_slots, strict=True):
            saved = state["of_slots"][slot]
            for key, part, _ in _states(metrics):
                setattr(part, key.rpartition("/")[2], _on_device(saved["states"][key], part.device))
            for place, part in _placed(metrics):
                part._update_count = saved["counts"][place]


def _never() -> bool:
    return False


def _parts(metric: "Metric") -> dict[str, "Metric"]:
    """Return the metrics of which a metric or a collection consists, by their place in it."""
    from torchmetrics import Metric  # slow to import, and here already: the metric is one

    return {path: part for path, part in metric.named_modules() if isinstance(part, Metric)}


def _placed(metrics: Mapping[str, "Metric"]) -> Iterator[tuple[str, "Metric"]]:
    for name, metric in metrics.items():
        for path, part in _parts(metric).items():
            yield f"{name}/{path}", part


def _states(metrics: Mapping[str, "Metric"]) -> Iterator[tuple[str, "Metric", Any]]:
    for place, part in _placed(metrics):
        for attribute in part._reductions:
            yield f"{place}/{attribute}", part, getattr(part, attribute)


def _counts(metrics: Mapping[str, "Metric"]) -> dict[str, int]:
    return {place: part.update_count for place, part in _placed(metrics)}


def _value(name: str, metric: "Metric", of_slots: Sequence[SlotState]) -> Any:
    """Return the value of a metric with the states of all slots."""
    if not of_slots:
        return None
    metric.reset()
    for place, part in _placed({name: metric}):
        for attribute, merge in part._reductions.items():
            found = [each["states"][f"{place}/{attribute}"] for each in of_slots]
            setattr(part, attribute, _merged(found, merge, part.device))
        part._update_count = sum(each["counts"][place] for each in of_slots)
    return plain_value(metric.compute())


def _merged(found: Sequence[Any], merge: Any, device: torch.device) -> Any:
    """Return a state over all slots, as torchmetrics makes it over all ranks; a list stays one, with all elements."""
    if isinstance(found[0], list):
        return [each.to(device) for state in found for each in state]
    stacked = torch.stack([state.to(device) for state in found])
    return stacked if merge is None else merge(stacked)


def _on_host(state: Any) -> Any:
    if isinstance(state, list):
        return [_on_host(each) for each in state]
    return torch.as_tensor(state).detach().cpu().clone()


def _on_device(state: Any, device: torch.device) -> Any:
    return [each.to(device) for each in state] if isinstance(state, list) else state.to(device).clone()
