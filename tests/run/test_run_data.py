"""The loader and the identity of the training data, for data with indices and for streams."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import points, single, small_config
from torch.utils.data import IterableDataset, Subset, random_split

from disttrain.data import Mixture, Sequential, SlotLoader, StreamLoader, Weighted
from disttrain.errors import ConfigError, DataError
from disttrain.parallel import Slots
from disttrain.run.data import build_data
from disttrain.run.length import total_steps


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


def test_an_order_is_built_from_the_data_and_decides_about_the_length_of_the_run() -> None:
    def backwards(data: Any, seed: int, global_batch_size: int) -> Any:
        assert (len(data), seed, global_batch_size) == (32, 5, 8)
        return Weighted(data, seed, global_batch_size, weights=[1] * 32, num_samples=81)

    config = small_config(order=backwards)
    data = build_data(config, Slots(2), single())
    assert isinstance(data.loader, SlotLoader)
    assert len(data.loader) == 10
    assert data.identity["order_length"] == 81
    assert total_steps(config, data.identity) == 20
    assert "order_length" not in build_data(small_config(), Slots(2), single()).identity


def test_a_dict_of_datasets_is_mixed_by_an_order() -> None:
    def sources() -> Any:
        return {"web": points(24), "code": points(8)}

    order = partial(Mixture, shares={"web": 1, "code": 1})
    data = build_data(small_config(train_data=sources, order=order), Slots(2), single())
    assert data.identity["dataset_length"] == 32
    with pytest.raises(DataError, match=r"train_data\['code'\]: expected at least one sample, got an empty list"):
        build_data(small_config(train_data=lambda: {"web": [1], "code": []}, order=order), Slots(2), single())
    with pytest.raises(
        ConfigError, match=r"^train_data: expected a dataset, got a dict of 2 .'web', 'code'.; return one"
    ):
        build_data(small_config(train_data=sources), Slots(2), single())


def test_validation_data_of_several_sets_is_a_function_for_each() -> None:
    with pytest.raises(ConfigError, match=r"^valid_data: expected a function that returns one dataset, got a"):
        build_data(small_config(valid_data=lambda: {"a": range(3), "b": range(3)}), Slots(2), single())


def test_wrong_orders_name_the_field() -> None:
    def built(**changes: Any) -> None:
        build_data(small_config(**changes), Slots(2), single())

    def broken(data: Any, seed: int, global_batch_size: int) -> Any:
        raise ValueError("no such file of scores")

    with pytest.raises(ConfigError, match=r"^order raised ValueError: no such file of scores \(tests"):
        built(order=broken)
    with pytest.raises(
        ConfigError, match=r"^order: expected a function .* that returns an object .*, got a list from it"
    ):
        built(order=lambda data, seed, global_batch_size: [1, 2, 3])
    with pytest.raises(
        ConfigError, match=r"^order: expected several sources for a Mixture, got train_data of one .Tensor"
    ):
        built(order=partial(Mixture, shares={"web": 1}))
    with pytest.raises(
        ConfigError, match=r"^order: expected None for training data that can only be iterated .Stream., got"
    ):
        built(train_data=Stream, order=Sequential, max_epochs=None, max_steps=3)
    with pytest.raises(
        ConfigError, match=r"^order: expected .data, seed, global_batch_size. -> Order, got the class Mixt"
    ):
        small_config(order=Mixture)
    with pytest.raises(
        ConfigError, match=r"^order: expected .data, seed, global_batch_size. -> Order . None, got 'shuffle'"
    ):
        small_config(order="shuffle")


def test_both_factories_may_cut_one_data_set_by_the_same_random_split() -> None:
    built: list[Subset[object]] = []

    def split(part: int) -> Subset[object]:
        built.append(random_split(points(40), [32, 8])[part])
        return built[-1]

    build_data(small_config(train_data=lambda: split(0), valid_data=lambda: split(1)), Slots(2), single())
    train, valid = (set(subset.indices) for subset in built)
    assert (len(train), len(valid)) == (32, 8)
    assert train.isdisjoint(valid)
