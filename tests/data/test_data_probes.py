"""Probes are loaded where batches are loaded, under seeds of their own, and change no batch."""

import os
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from augmented_data import NUM_SAMPLES, Augmented, Broken, InBatches, loader_of, random_state, sampler_of, take
from streamed_data import KINDS, Numbers, Shards, stream_loader, take_steps

from disttrain.data import Probe, SlotLoader, evaluation_probes, probed_indices
from disttrain.data.dataset import CollatedDataset
from disttrain.seeding import seed_config


def shown(sample: Any) -> str:
    return repr(sample)


def without_process(samples: Any) -> str:
    return repr([sample[:2] for sample in samples])


def process(samples: Any) -> str:
    return str(samples[0][2])


def probes(*indices: int, digest: Any = without_process, seed: int = 3) -> list[Probe]:
    return [Probe(index, seed=seed, digest=digest) for index in indices]


@pytest.mark.parametrize(("num_samples", "count", "expected"), [(1, 3, 1), (2, 3, 2), (100, 2, 2), (10**9, 3, 3)])
def test_the_first_the_last_and_fixed_ones_between(num_samples: int, count: int, expected: int) -> None:
    indices = probed_indices(num_samples, count)
    assert indices == probed_indices(num_samples, count)
    assert (indices[0], indices[-1]) == (0, num_samples - 1)
    assert len(indices) == expected


def test_a_probe_is_the_same_in_any_process_and_the_batches_stay_as_they_are() -> None:
    plain = take(loader_of(), 6)
    digests = []
    for num_workers in (0, 1, 2):
        loader = loader_of(num_workers=num_workers)
        before = random_state()
        digests.append(loader.load_probes(probes(0, 41, 69, 69, 41, 0)))
        assert random_state() == before
        assert (loader.epoch, loader.step) == (0, 0)
        assert take(loader, 6) == plain
        loader.close()
    assert digests[0] == digests[1] == digests[2]
    assert digests[0][:3] == digests[0][:2:-1]
    assert len(set(digests[0])) == 3
    assert loader_of().load_probes(probes(0, seed=4)) != digests[0][:1]


def test_probes_are_loaded_by_the_workers_that_load_the_next_steps() -> None:
    loader = loader_of(num_workers=2)
    loader.seek(1, 2)
    workers = loader.load_probes(probes(5, 5, digest=process))
    assert len({*workers, str(os.getpid())}) == 3
    batch = next(iter(loader))
    assert (batch.epoch, batch.step) == (1, 2)
    assert {str(int(pid)) for _, _, pids in batch for pid in pids} == set(workers)
    assert [samples.tolist() for samples, _, _ in batch] == sampler_of().samples(1, range(2, 3)).reshape(8, 2).tolist()
    loader.close()


def test_an_exception_is_left_to_the_step_that_needs_the_sample() -> None:
    loader = SlotLoader(Broken(NUM_SAMPLES, 41, KeyError("no pixels")), sampler_of())
    assert loader.load_probes(probes(41)) == ["raised KeyError"]
    whole = SlotLoader(InBatches(NUM_SAMPLES, bad=3), sampler_of())
    assert whole.load_probes(probes(3, 4, digest=shown))[0] == "raised ValueError"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_those_of_an_evaluation_are_loaded_where_its_batches_are(num_workers: int) -> None:
    by = evaluation_probes(Augmented(20), probes(3, 4, digest=process), num_workers)()
    assert (by == [str(os.getpid())] * 2) is (num_workers == 0)
    digests = evaluation_probes(Augmented(20), probes(3, 4), num_workers)()
    assert digests == evaluation_probes(Augmented(20), probes(3, 4), 0)()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_begins_alike_on_every_rank_and_is_read_on_as_before(kind: type[Numbers]) -> None:
    plain = take_steps(stream_loader(kind()), 5)
    begins = []
    for num_workers, slots in [(0, None), (0, range(1, 3)), (1, None)]:
        loader = stream_loader(kind(), slots, num_workers=num_workers)
        begins.append(loader.load_probes(2, first_number))
        if slots is None:
            assert take_steps(loader, 5) == plain
        loader.close()
    assert begins[0] == begins[1] == begins[2]
    assert len(set(begins[0])) == 2


def first_number(sample: Any) -> str:
    return repr(sample[:2])


def test_a_stream_may_end_or_raise_before() -> None:
    assert len(stream_loader(Shards((1, 7, 12, 8))).load_probes(2, first_number)) == 1
    assert stream_loader(Shards(bad=1)).load_probes(2, first_number)[1:] == ["raised ValueError"]


def test_a_worker_that_is_not_forked_unpickles_the_dataset_under_the_seed_of_a_cfg() -> None:
    data = pickle.dumps(CollatedDataset(AtImport()))
    np.random.seed(99)
    assert pickle.loads(data).dataset.drawn == first_draw()


class AtImport:
    """Stands for a module whose import draws: its unpickling draws from a global generator."""

    drawn = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return made_anew, ()


def made_anew() -> AtImport:
    made = AtImport()
    made.drawn = np.random.random()
    return made


def first_draw() -> float:
    seed_config()
    return np.random.random()


class Threads(Augmented):
    def __getitem__(self, index: int) -> int:
        return torch.get_num_threads()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_is_loaded_with_one_thread_whatever_the_process_uses(num_workers: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loader = SlotLoader(Threads(NUM_SAMPLES), sampler_of(), num_workers=num_workers)
        batch = next(iter(loader))
        assert {int(number) for microbatch in batch for number in microbatch} == {1}
        assert torch.get_num_threads() == 2
        loader.close()
    finally:
        torch.set_num_threads(before)
