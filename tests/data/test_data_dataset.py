"""Datasets load under the seed of a batch, an error is one line that names the sample, and fingerprints differ."""

import pickle
import random
import re
import tracemalloc

import pytest
import torch
from augmented_data import Augmented, Broken, InBatches, random_state
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from disttrain.data import (
    LoadingError,
    Microbatch,
    SeededDataset,
    SlotBatchSampler,
    check_dataset,
    check_stream,
    fingerprint,
    is_iterable_style,
)
from disttrain.data.dataset import SampleError
from disttrain.errors import DataError
from disttrain.seeding import manual_seed


def microbatch(*indices, seed=5):
    return Microbatch(list(indices), seed=seed, epoch=1, step=2, slot=3)


def draws(samples):
    return [draw.tolist() for _, draw, _ in samples]


def test_a_batch_is_drawn_under_its_seed_whatever_was_drawn_before():
    dataset = SeededDataset(Augmented(20))
    first = dataset.__getitems__(microbatch(3, 4))
    random.random()
    assert draws(dataset.__getitems__(microbatch(3, 4))) == draws(first)
    assert draws(dataset.__getitems__(microbatch(3, 4, seed=6))) != draws(first)
    manual_seed(5)
    assert draws([Augmented(20)[3], Augmented(20)[4]]) == draws(first)
    assert len(dataset) == 20
    assert dataset[7][0] == 7


def test_a_dataset_that_loads_batches_does():
    inner = InBatches(20)
    samples = SeededDataset(inner).__getitems__(microbatch(3, 1, 4))
    assert inner.asked == [[3, 1, 4]]
    random.seed(5)
    assert samples == [(index, random.random()) for index in (3, 1, 4)]


def test_torch_subsets_load_through():
    samples = SeededDataset(Subset(InBatches(20), [10, 11, 12])).__getitems__(microbatch(2, 0))
    assert [index for index, _ in samples] == [12, 10]


def test_a_batch_without_a_seed_is_refused():
    with pytest.raises(
        TypeError, match="batches that carry a seed, got a list; give the DataLoader a SlotBatchSampler"
    ):
        SeededDataset(Augmented(5)).__getitems__([1, 2])


def without_place(error):
    """Return the message of an error after a check that it names the line of the dataset that raised."""
    message, count = re.subn(r" \(\S*augmented_data.py:\d+ in __getitems?__\)", "", str(error))
    assert count == 1
    return message


SAMPLE_ERRORS = [
    (ValueError("bad\n  pixels"), "dataset[4] raised ValueError: bad pixels; "),
    (KeyError("left"), "dataset[4] raised KeyError: 'left'; "),
    (StopIteration(), "dataset[4] raised StopIteration; "),
    (DataError("Caught cold: it's bad"), "dataset[4] raised DataError: Caught cold: it's bad; "),
    (RuntimeError("x" * 1000), "dataset[4] raised RuntimeError: " + "x" * 300 + "...; "),
]


@pytest.mark.parametrize(("error", "beginning"), SAMPLE_ERRORS, ids=lambda value: type(value).__name__)
def test_a_sample_that_raises_is_named(error, beginning):
    with pytest.raises(LoadingError) as caught:
        SeededDataset(Broken(20, 4, error)).__getitems__(microbatch(3, 4))
    assert without_place(caught.value) == (
        f"{beginning}repair that sample or leave it out (it is in the microbatch of epoch=1, step=2, slot=3)"
    )
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, DataError)


@pytest.mark.parametrize(("error", "beginning"), SAMPLE_ERRORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_message_is_the_same_from_a_worker(error, beginning, num_workers):
    sampler = SlotBatchSampler(20, 10, shuffle=False)
    loader = DataLoader(SeededDataset(Broken(20, 4, error)), batch_sampler=sampler, num_workers=num_workers)
    iterator = iter(loader)
    with pytest.raises(LoadingError) as caught:
        next(iterator)
    assert without_place(caught.value) == (
        f"{beginning}repair that sample or leave it out (it is in the microbatch of epoch=0, step=0, slot=0)"
    )
    assert type(caught.value) is (SampleError if isinstance(error, (ValueError, KeyError)) else LoadingError)
    if num_workers:
        (note,) = caught.value.__notes__
        assert "in DataLoader worker process 0" in note
        assert "augmented_data.py" in note
        # Otherwise it ends when its traceback is collected, perhaps in the next test's worker.
        iterator._shutdown_workers()
    else:
        assert caught.value.__cause__ is error


def test_the_error_travels_whole():
    error = LoadingError("dataset[4] raised ValueError: bad: it is")
    assert str(pickle.loads(pickle.dumps(error))) == "dataset[4] raised ValueError: bad: it is"


def test_the_bad_sample_of_a_dataset_that_loads_batches_is_found():
    message = r"^dataset\[4\] raised ValueError: bad pixels \(.*data.py:\d+ in __getitems__\); repair that sample"
    with pytest.raises(LoadingError, match=message) as caught:
        SeededDataset(InBatches(20, bad=4)).__getitems__(microbatch(3, 4, 5))
    assert str(caught.value.__cause__) == "bad pixels"


def test_a_dataset_that_loads_nothing_but_batches_has_its_batch_named():
    with pytest.raises(LoadingError) as caught:
        SeededDataset(InBatches(20, bad=4, alone=False)).__getitems__(microbatch(3, 4, 5))
    assert without_place(caught.value) == (
        "dataset.__getitems__ raised ValueError: bad pixels, "
        "loading the microbatch of epoch=1, step=2, slot=3 (dataset indices 3, 4, 5)"
    )


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Unsized(Dataset):
    def __getitem__(self, index):
        return index


class NotIndexed:
    def __len__(self):
        return 3


def test_which_datasets_can_only_be_iterated():
    assert [is_iterable_style(data) for data in (Numbers(), iter([1]), [1], Augmented(3), NotIndexed())] == [
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Numbers(), "train_data: expected .* got Numbers, which can only be iterated; put its samples into a list"),
        (NotIndexed(), "train_data: expected .* got NotIndexed, which cannot be indexed; give it a __getitem__"),
        (Unsized(), "train_data: expected .* got Unsized, whose length is unknown .*; give it a __len__"),
        (Augmented(0), "train_data: expected at least one sample, got an empty Augmented; check"),
    ],
)
def test_datasets_that_cannot_be_used(dataset, message):
    with pytest.raises(DataError, match=message):
        check_dataset(dataset, "train_data")


def test_what_identifies_a_dataset():
    dataset = Augmented(12)
    assert check_dataset(dataset) == {"dataset_length": 12, "dataset_fingerprint": fingerprint(dataset)}


class Own(Augmented):
    def __init__(self, mark):
        super().__init__(10)
        self.mark = mark

    def fingerprint(self):
        return self.mark


def tensors(seed, rows=50, dtype=torch.float32):
    return TensorDataset(torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed)).to(dtype))


def test_fingerprints_tell_datasets_apart():
    datasets = [
        Augmented(10),
        Augmented(11),
        InBatches(10),
        list(range(10)),
        Own("a"),
        Own("b"),
        tensors(0),
        tensors(1),
        tensors(0, 51),
        tensors(0, dtype=torch.float64),
        tensors(0, dtype=torch.bfloat16),
        TensorDataset(torch.arange(50) % 2 == 0),
        Subset(tensors(0), range(10)),
        Subset(tensors(0), range(1, 11)),
        Subset(tensors(1), range(10)),
        ConcatDataset([tensors(0), tensors(1)]),
        ConcatDataset([tensors(1), tensors(0)]),
    ]
    found = [fingerprint(dataset) for dataset in datasets]
    assert len(set(found)) == len(found)
    assert found == [fingerprint(dataset) for dataset in datasets]
    assert fingerprint(tensors(0)) == fingerprint(tensors(0))


@pytest.mark.parametrize("indices", [range(0), range(50), range(7, 200_000, 3), range(70_000, 2, -1)])
def test_a_range_of_indices_has_the_fingerprint_of_its_list(indices):
    data = range(200_000)
    expected = fingerprint(Subset(data, list(indices)))
    tracemalloc.start()
    try:
        assert fingerprint(Subset(data, indices)) == expected
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_a_range_of_very_many_indices_has_a_fingerprint_at_once():
    data = range(10**12)
    ranges = [range(10**11), range(1, 10**11 + 1), range(0, 2 * 10**11, 2), range(10**11 + 1)]
    assert len({fingerprint(Subset(data, each)) for each in ranges}) == len(ranges)


def test_a_fingerprint_neither_loads_a_sample_nor_draws():
    before = random_state()
    check_dataset(Broken(10, 0, AssertionError("loaded")))
    fingerprint(tensors(0))
    assert random_state() == before


def test_a_streams_length_and_fingerprint():
    class Sized(Numbers):
        def __len__(self):
            return 3

    assert check_stream(Numbers())["dataset_length"] is None
    assert check_stream(Sized())["dataset_length"] == 3
    assert check_stream(Numbers())["dataset_fingerprint"] == check_stream(Numbers())["dataset_fingerprint"]
    assert check_stream(Numbers())["dataset_fingerprint"] != check_stream(Sized())["dataset_fingerprint"]


def generated():
    yield 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            generated(),
            "train_data: expected an object whose iter.. begins anew each time, got a generator, which can be",
        ),
        (iter([1]), "got a list_iterator, which can be read only once; return an IterableDataset"),
        (
            DataLoader(Numbers()),
            "train_data: expected a dataset, which gives samples, got a DataLoader, which gives bat",
        ),
        (set(), "train_data: expected at least one sample, got an empty set"),
    ],
)
def test_what_is_no_stream(data, message):
    with pytest.raises(DataError, match=message):
        check_stream(data, "train_data")
