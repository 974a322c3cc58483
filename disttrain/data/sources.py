"""Training data of several sources: a dict of datasets, one after the other under one count of indices."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import ConcatDataset

from disttrain.data.dataset import check_dataset
from disttrain.errors import DataError


class Sources(ConcatDataset[Any]):
    """Datasets with names, such as {"web": ..., "code": ...}: the samples of the first, then those of the second.

    *Errors*: DataError, with the source's name, for a source that is empty, has no length, or can only be iterated.
    """

    def __init__(self, datasets: Mapping[str, Any]) -> None:
        if not datasets:
            raise DataError("train_data: expected a dict with at least one dataset, got {}")
        for name, dataset in datasets.items():
            check_dataset(dataset, f"train_data[{name!r}]")
        super().__init__(datasets.values())
        self.names = tuple(datasets)


def is_sources(dataset: Any) -> bool:
    """Return whether `dataset` is a dict of datasets. One whose keys are integers is a dataset by itself."""
    return isinstance(dataset, dict) and bool(dataset) and all(isinstance(key, str) for key in dataset)
