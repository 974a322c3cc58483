"""The loader and the identity of the training data, for data with indices and for streams."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_run import points, single, small_config
from torch.utils.data import IterableDataset, Subset, random_split

from disttrain.data import SlotLoader, StreamLoader
from disttrain.errors import ConfigError
from disttrain.parallel import Slots
from disttrain.run.data import build_data


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(points())  # type: ignore[call-overload,no-any-return]


class LongEnough(Stream):
    def __len__(self) -> int:
        return 32


def test_data_with_indices_has_a_loader_by_position(tmp_path: Path) -> None:
    data = build_data(small_config(), Slots(2), single())
    assert isinstance(data.loader, SlotLoader)
    assert data.identity["dataset_length"] == 32
    assert data.valid is not None
    assert build_data(small_config(valid_data=None), Slots(2), single()).valid is None


def test_the_same_data_has_the_same_identity_and_other_data_has_another() -> None:
    def identity(num_samples: int) -> object:
        return build_data(small_config(train_data=lambda: points(num_samples)), Slots(2), single()).identity

    assert identity(32) == identity(32)
    assert identity(32) != identity(40)


def test_a_stream_is_read_in_order_and_needs_a_known_end() -> None:
    data = build_data(small_config(train_data=Stream, max_epochs=None, max_steps=5), Slots(2), single())
    assert isinstance(data.loader, StreamLoader)
    assert data.identity["shards"] is None
    with pytest.raises(ConfigError, match=r"got a stream without a length .*say where the run ends by max_steps"):
        build_data(small_config(train_data=Stream), Slots(2), single())
    assert build_data(small_config(train_data=LongEnough), Slots(2), single()).identity["dataset_length"] == 32


def test_both_factories_may_cut_one_data_set_by_the_same_random_split() -> None:
    built: list[Subset[object]] = []

    def split(part: int) -> Subset[object]:
        built.append(random_split(points(40), [32, 8])[part])
        return built[-1]

    build_data(small_config(train_data=lambda: split(0), valid_data=lambda: split(1)), Slots(2), single())
    train, valid = (set(subset.indices) for subset in built)
    assert (len(train), len(valid)) == (32, 8)
    assert train.isdisjoint(valid)
