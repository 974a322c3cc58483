"""A dict of datasets as one dataset."""

import pytest
import torch
from torch.utils.data import ConcatDataset, IterableDataset, TensorDataset

from disttrain.data import Sources, fingerprint
from disttrain.data.sources import is_sources
from disttrain.errors import DataError


def test_the_samples_of_one_source_come_after_those_of_the_one_before():
    sources = Sources({"web": ["w0", "w1", "w2"], "code": ["c0", "c1"]})
    assert [sources[i] for i in range(len(sources))] == ["w0", "w1", "w2", "c0", "c1"]
    assert sources.names == ("web", "code")
    assert isinstance(sources, ConcatDataset)


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
