"""Batches with a weight: the number of targets in a batch over which its mean loss is computed.

*Contract*: the weight is computed where the batch is collated, in a worker or not, and travels with the batch. It is an
integer, so sums of weights are exact.

*Errors*: TypeError or ValueError, which the loader turns into a LoadingError, for a weight that is no integer >= 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.data import default_collate


class WeightedBatch(NamedTuple):
    """A collated batch, and the number of targets that count in it."""

    batch: Any
    weight: int


class WeightedCollate:
    """Collates samples and computes the batch's weight: `weight(batch) -> int`."""

    def __init__(self, weight: Callable[[Any], Any], collate: Callable[[list[Any]], Any] | None = None) -> None:
        self.weight = weight
        self.collate = default_collate if collate is None else collate
        self.__name__ = "collate or weight"

    def __call__(self, samples: list[Any]) -> WeightedBatch:
        batch = self.collate(samples)
        weight = self.weight(batch)
        value = weight.item() if hasattr(weight, "item") else weight
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"expected weight(batch) to be an integer, got {type(weight).__name__} {value!r}")
        if value < 0:
            raise ValueError(f"expected weight(batch) to be 0 or more, got {value}")
        return WeightedBatch(batch, value)


def weight_of(batch: WeightedBatch) -> int:
    """Return the weight of a batch."""
    return batch.weight


def without_weight(batch: Any) -> Any:
    """Return the batch that the collate function made."""
    return batch.batch if isinstance(batch, WeightedBatch) else batch
