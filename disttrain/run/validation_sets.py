"""Several sets of validation data, evaluated one after another as if they were one: `valid_data={"clean": ..., ...}`.

*Contract*: each set has an evaluation of its own, with its own metrics, so its values are those that it would have
alone. They are called SET/NAME, such as `clean/loss`. If a signal ends one evaluation, the whole counts as not done.
"""

from collections.abc import Callable, Mapping
from typing import Any

from disttrain.run.evaluation import Batches, Evaluation


class ValidationSets:
    """The evaluations of several sets, by the names of the sets; it is used as a single `Evaluation` is."""

    def __init__(self, by_set: Mapping[str, Evaluation]) -> None:
        self.by_set = dict(by_set)

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of all sets, by the names of their values."""
        return {f"{name}/{key}": metric for name, one in self.by_set.items() for key, metric in one.metrics.items()}

    def run(
        self, stop: Callable[[], bool] | None = None, watched: Callable[[Batches], Batches] = lambda batches: batches
    ) -> dict[str, Any] | None:
        """Return the values of all sets, the same on every rank; None, on every rank, if `stop()` returned True."""
        values: dict[str, Any] = {}
        for name, evaluation in self.by_set.items():
            own = evaluation.run(stop, watched)
            if own is None:
                return None
            values |= {f"{name}/{key}": value for key, value in own.items()}
        return values


def evaluations_of(data: Any, build: Callable[[Any, str], Evaluation]) -> Evaluation | ValidationSets | None:
    """Return the evaluation of the validation data, or those of its sets; None without data.

    `build(dataset, field)` makes one.
    """
    if data is None:
        return None
    if isinstance(data, NamedSets):
        return ValidationSets({name: build(dataset, f"valid_data.{name}") for name, dataset in data.items()})
    return build(data, "valid_data")


class NamedSets(dict[str, Any]):
    """Validation data by the names of its sets; another dict may be one dataset."""


def named_sets(data: Any) -> dict[str, Any]:
    """Return the datasets of the validation data by the fields that build them; none without."""
    if isinstance(data, NamedSets):
        return {f"valid_data.{name}": dataset for name, dataset in data.items()}
    return {} if data is None else {"valid_data": data}
