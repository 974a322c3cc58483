"""A batch's weight: computed where the batch is collated, and an integer of 0 or more."""

from typing import Any

import numpy as np
import pytest
import torch

from disttrain.data import SlotBatchSampler, SlotLoader
from disttrain.data.weighted import WeightedBatch, WeightedCollate, weight_of, without_weight
from disttrain.errors import DataError


def loader(weight: Any, num_workers: int = 0) -> SlotLoader:
    sampler = SlotBatchSampler(8, 4, 2, seed=1, slots=range(2))
    return SlotLoader(range(8), sampler, num_workers=num_workers, collate_fn=WeightedCollate(weight, list))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_weight_travels_with_its_batch(num_workers: int) -> None:
    batches = loader(lambda batch: sum(number % 2 for number in batch), num_workers)
    seen = [microbatch for step in batches for microbatch in step]
    batches.close()
    assert sorted(number for microbatch in seen for number in microbatch.batch) == list(range(8))
    assert [weight_of(each) for each in seen] == [sum(n % 2 for n in without_weight(each)) for each in seen]


@pytest.mark.parametrize("weight", [3, np.int64(3), torch.tensor(3), np.array(3)])
def test_whole_numbers_of_any_library_are_taken(weight: Any) -> None:
    assert WeightedCollate(lambda batch: weight, list)([1, 2]) == WeightedBatch([1, 2], 3)
    assert type(WeightedCollate(lambda batch: weight, list)([1, 2]).weight) is int


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (2.0, "expected weight(batch) to be an integer, got float 2.0"),
        (torch.tensor(1.5), "expected weight(batch) to be an integer, got Tensor 1.5"),
        (True, "expected weight(batch) to be an integer, got bool True"),
        (None, "expected weight(batch) to be an integer, got NoneType None"),
        (-1, "expected weight(batch) to be 0 or more, got -1"),
    ],
)
def test_other_weights_are_named_with_their_batch(weight: Any, told: str) -> None:
    with pytest.raises(DataError) as caught:
        next(iter(loader(lambda batch: weight)))
    assert told in str(caught.value)


def test_without_a_collate_function_torch_makes_the_batch() -> None:
    batch, weight = WeightedCollate(len)([torch.ones(2), torch.zeros(2)])
    assert torch.equal(batch, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert weight == 2
    assert without_weight([1]) == [1]
