"""Tells datasets with `set_epoch(epoch)` the epoch of the samples that are loaded next.

*Contract*: a batch names its epoch, and the dataset is told before the first sample of a batch of another epoch, in
each process that loads samples. So it is right with workers that live on, that fetch the next epoch while this one
ends, and after a resume in the middle of an epoch. Evaluations, and the samples that are compared before a run, are of
epoch 0. The draws in `set_epoch` are seeded by (run's seed, epoch), the same in every process.

Told are the dataset, or, where torch's ConcatDataset, StackDataset or Subset has no `set_epoch`, the datasets inside.

*Errors*: LoadingError for an exception of `set_epoch`; the caller makes it.

*Cost*: nothing for a dataset without `set_epoch`, else one call in each epoch and process, and two at an evaluation.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import ConcatDataset, StackDataset, Subset

from disttrain.seeding import seed_for, seed_position

_latest: tuple[object, int, int] | None = None
"""The one that told an epoch last in this process, the epoch, and the seed: two loaders may share a dataset."""


class EpochTeller:
    """Tells one dataset its epochs."""

    def __init__(self, dataset: Any) -> None:
        self._listeners = list(listeners(dataset))
        self._name = object()  # `_latest` must not keep the dataset alive

    def tell(self, epoch: int, run_seed: int) -> None:
        """Call `set_epoch(epoch)` unless this was the last call in this process; it moves the global generators."""
        global _latest
        if not self._listeners or _latest == (self._name, epoch, run_seed):
            return
        _latest = None
        for listener in self._listeners:
            seed_position(seed_for(run_seed, "epoch", epoch))
            listener.set_epoch(epoch)
        _latest = self._name, epoch, run_seed


def listeners(dataset: Any) -> Iterator[Any]:
    """Yield the dataset if it has a `set_epoch`, else the datasets with one that torch's containers hold."""
    if callable(getattr(dataset, "set_epoch", None)):
        yield dataset
    elif isinstance(dataset, Subset):
        yield from listeners(dataset.dataset)
    elif isinstance(dataset, ConcatDataset | StackDataset):
        parts = dataset.datasets.values() if isinstance(dataset.datasets, Mapping) else dataset.datasets
        for part in parts:
            yield from listeners(part)
