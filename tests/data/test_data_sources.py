"""A dict of datasets as one dataset."""

import pytest
import torch
from torch.utils.data import ConcatDataset, IterableDataset, TensorDataset

from disttrain.data import SlotBatchSampler, SlotLoader, Sources, fingerprint
from disttrain.data.sources import is_sources
from disttrain.errors import DataError


class Together:
    """A source that loads samples together, and has no other way."""

    def __init__(self, size):
        self.size, self.asked = size, []

    def __len__(self):
        return self.size

    def __getitems__(self, indices):
        self.asked.append(indices)
        return list(indices)


def test_the_samples_of_one_source_come_after_those_of_the_one_before():
    sources = Sources({"web": ["w0", "w1", "w2"], "code": ["c0", "c1"]})
    assert [sources[i] for i in range(len(sources))] == ["w0", "w1", "w2", "c0", "c1"]
    assert sources.names == ("web", "code")
    assert isinstance(sources, ConcatDataset)


def test_batches_are_loaded_together_where_a_source_can():
    alone = Sources({"a": ["a0", "a1"], "b": Together(3)})
    mixed = [4, 0, 2, 1, 3]
    assert alone.__getitems__(mixed) == [2, "a0", 0, "a1", 1] == [alone[index] for index in mixed]
    assert alone.datasets[1].asked[0] == [2, 0, 1]
    assert Sources({"a": ["a0"], "b": ["b0"]}).__getitems__ is None
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"expected an index below 5, got {index}"):
            alone[index]
    assert alone[-1] == 2


def test_they_are_loaded_by_position():
    sources = Sources({"a": ["a0", "a1", "a2"], "b": Together(3)})
    loader = SlotLoader(sources, SlotBatchSampler(6, 6, 2, seed=1), collate_fn=list)
    batches = next(iter(loader))
    assert batches == [[sources[i] for i in loader.sampler.batch(0, 0, slot)] for slot in (0, 1)]


def test_its_identity_is_that_of_its_parts():
    def named(value):
        return Sources({"a": TensorDataset(torch.ones(3)), "b": TensorDataset(torch.full((3,), value))})

    assert fingerprint(named(1.0)) == fingerprint(named(1.0)) != fingerprint(named(2.0))


def test_sources_that_cannot_be_mixed():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([1])

    with pytest.raises(
        DataError, match=r"train_data\['code'\]: expected at least one sample, got an empty list; check"
    ):
        Sources({"web": [1], "code": []})
    with pytest.raises(DataError, match=r"train_data\['web'\]: expected a dataset with __len__ and .*, got Stream"):
        Sources({"web": Stream()})
    with pytest.raises(DataError, match=r"expected a dict with at least one dataset, got {}"):
        Sources({})


def test_a_dict_with_integer_keys_is_a_dataset_by_itself():
    assert is_sources({"web": [1], "code": [2]})
    assert not is_sources({0: "a", 1: "b"})
    assert not is_sources([1, 2])
    assert not is_sources({})
