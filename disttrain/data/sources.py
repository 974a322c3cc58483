"""Training data of several sources: a dict of datasets, one after the other under one count of indices."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import ConcatDataset

from disttrain.data.dataset import check_dataset, is_iterable_style
from disttrain.errors import DataError


class Sources(ConcatDataset[Any]):
    """Datasets with names, such as {"web": ..., "code": ...}: the samples of the first, then those of the second.

    The samples of a batch are loaded together where a source can do that (`__getitems__`), source by source.

    *Errors*: DataError, with the source's name, for a source that is empty, has no length, or can only be iterated.
    """

    def __init__(self, datasets: Mapping[str, Any]) -> None:
        if not datasets:
            raise DataError("train_data: expected a dict with at least one dataset, got {}")
        for name, dataset in datasets.items():
            if is_iterable_style(dataset):
                raise DataError(
                    f"train_data[{name!r}]: expected a dataset with __len__ and __getitem__, got "
                    f"{type(dataset).__name__}, which can only be iterated; a mixture needs samples at any position"
                )
            check_dataset(dataset, f"train_data[{name!r}]")
        super().__init__(datasets.values())
        self.names = tuple(datasets)

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""
        source, place = self._place(index)
        part: Any = self.datasets[source]
        return part[place] if hasattr(part, "__getitem__") else part.__getitems__([place])[0]

    @property
    def __getitems__(self) -> Callable[[list[int]], list[Any]] | None:
        """The function that loads a batch; None if no source loads samples together, as torch's loaders expect it."""
        return self._batch if any(getattr(part, "__getitems__", None) for part in self.datasets) else None

    def _batch(self, indices: list[int]) -> list[Any]:
        samples: list[Any] = [None] * len(indices)
        placed = [(*self._place(index), number) for number, index in enumerate(indices)]
        for source in sorted({source for source, _, _ in placed}):
            places, here = zip(*((place, number) for found, place, number in placed if found == source), strict=True)
            part: Any = self.datasets[source]
            getitems = getattr(part, "__getitems__", None) or (lambda chosen, part=part: [part[i] for i in chosen])
            for number, sample in zip(here, getitems(list(places)), strict=True):
                samples[number] = sample
        return samples

    def _place(self, index: int) -> tuple[int, int]:
        """Return the source of an index, and the index in it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        index %= len(self)
        source = bisect_right(self.cumulative_sizes, index)
        return source, index - (self.cumulative_sizes[source - 1] if source else 0)


def is_sources(dataset: Any) -> bool:
    """Return whether `dataset` is a dict of datasets. One whose keys are integers is a dataset by itself."""
    return isinstance(dataset, dict) and bool(dataset) and all(isinstance(key, str) for key in dataset)
