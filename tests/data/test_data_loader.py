"""SlotLoader and evaluation_loader give the same bits on any workers and ranks, at exact positions, and end workers."""

import gc
import inspect
import itertools
import multiprocessing
import os
import random
import re
import time

import numpy as np
import pytest
import torch
from augmented_data import (
    GLOBAL_BATCH_SIZE,
    NUM_SAMPLES,
    NUM_SLOTS,
    NUM_STEPS,
    Augmented,
    Broken,
    Counting,
    ended,
    loaded_by,
    loader_of,
    random_state,
    sampler_of,
    samples_of,
    take,
)
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from disttrain.data import (
    LoadingError,
    ReproducibleBatchSampler,
    Seekable,
    SlotLoader,
    StepBatch,
    evaluation_loader,
    update_dataloader,
)
from disttrain.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def two_epochs():
    """Return every step of two epochs, loaded in this process and in one pass each."""
    return take(loader_of(), 2 * NUM_STEPS)


def test_what_is_loaded_is_augmented_and_all_of_it(two_epochs):
    assert len({str(step) for step in two_epochs}) == len(two_epochs)
    draws = [tuple(draw) for step in two_epochs for _, draws in step for draw in draws]
    assert len(set(draws)) == len(draws)
    for epoch in (two_epochs[:NUM_STEPS], two_epochs[NUM_STEPS:]):
        indices = [index for step in epoch for indices, _ in step for index in indices]
        assert len(set(indices)) == NUM_STEPS * GLOBAL_BATCH_SIZE


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same(num_workers, two_epochs):
    assert take(loader_of(num_workers=num_workers), 2 * NUM_STEPS) == two_epochs


@pytest.mark.parametrize("num_workers", [0, 2])
def test_seeking_any_step_gives_the_same(num_workers, two_epochs):
    loader = loader_of(num_workers=num_workers)
    for first in reversed(range(2 * NUM_STEPS)):
        loader.seek(*divmod(first, NUM_STEPS))
        assert take(loader, 2) == (two_epochs + take(loader_of_epoch(2), 1))[first : first + 2]


def test_a_state_leads_back_with_other_workers_and_ranks(two_epochs):
    loader = loader_of(num_workers=1)
    assert loader.iteration == 0
    for iteration in range(1, NUM_STEPS + 3):
        take(loader, 1)
        assert loader.iteration == iteration
    state = loader.state_dict()
    for slots in (range(NUM_SLOTS), range(1, 3)):
        other = loader_of(slots)
        other.load_state_dict(state)
        assert (other.epoch, other.step, other.iteration) == (1, 2, NUM_STEPS + 2)
        (step,) = take(other, 1)
        assert step == two_epochs[NUM_STEPS + 2][slots.start : slots.stop]


@pytest.mark.parametrize("changed", ["num_samples", "global_batch_size", "num_slots", "seed", "shuffle"])
def test_a_state_of_other_batches_is_refused(changed):
    loader = loader_of()
    state = loader.state_dict()
    with pytest.raises(DataError, match=f"the batches would be others than before: expected .*'{changed}': 99"):
        loader.load_state_dict({**state, "epoch": 3, changed: 99})
    assert (loader.epoch, loader.step) == (0, 0)


def loader_of_epoch(epoch):
    loader = loader_of()
    loader.seek(epoch, 0)
    return loader


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 1), (3, 0), (5, 2), (8, 0)])
def test_any_number_of_ranks_gives_the_same(world_size, num_workers, two_epochs):
    shares = []
    for rank in range(world_size):
        slots = range(NUM_SLOTS * rank // world_size, NUM_SLOTS * (rank + 1) // world_size)
        loader = loader_of(slots, num_workers=num_workers)
        loader.seek(0, 3)
        shares.append(take(loader, 3))
    together = [[batch for share in step for batch in share] for step in zip(*shares, strict=True)]
    assert together == two_epochs[3:6]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generators_are_left_as_found(num_workers, two_epochs):
    before = random_state()
    loader = loader_of(num_workers=num_workers)
    for step, expected in zip(itertools.chain(loader, loader), two_epochs, strict=True):
        assert random_state() == before
        assert samples_of(step) == expected
        # The draws of the training do not change the next step.
        random.random(), np.random.random(), torch.rand(())
        before = random_state()
    list(evaluation_loader(Augmented(7), 2, num_workers=num_workers))
    assert random_state() == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_position_is_what_was_yielded(num_workers):
    loader = loader_of(range(2, 5), num_workers=num_workers)
    assert isinstance(loader, Seekable)
    assert len(loader) == NUM_STEPS
    for epoch in range(2):
        for step, batch in enumerate(loader):
            assert isinstance(batch, StepBatch)
            assert (batch.epoch, batch.step, batch.slots, len(batch)) == (epoch, step, range(2, 5), 3)
            following = (epoch, step + 1) if step + 1 < NUM_STEPS else (epoch + 1, 0)
            assert (loader.epoch, loader.step) == following
    loader.close()


def test_a_pass_that_was_left_goes_on_where_it_was_left(two_epochs):
    loader = loader_of(num_workers=1)
    first = [samples_of(step) for step in itertools.islice(loader, 2)]
    rest = [samples_of(step) for step in loader]
    assert first + rest == two_epochs[:NUM_STEPS]
    loader.seek(2, NUM_STEPS)
    assert (loader.epoch, loader.step) == (3, 0)
    with pytest.raises(ValueError, match="there is no epoch=0, step=5"):
        loader.seek(0, 5)


def test_a_loader_begins_where_its_sampler_stands(two_epochs):
    sampler = sampler_of()
    sampler.seek(1, 2)
    assert take(SlotLoader(Augmented(NUM_SAMPLES), sampler), 2) == two_epochs[NUM_STEPS + 2 :]


def test_workers_live_across_epochs_until_closed():
    loader = loader_of(num_workers=2)
    first = set().union(*map(loaded_by, loader))
    assert len(first) == 2
    assert os.getpid() not in first
    loader.seek(1, 0)  # the present position
    assert set().union(*map(loaded_by, loader)) == first
    loader.seek(0, 1)
    second = set().union(*map(loaded_by, loader))
    assert len(second) == 2
    assert not second & first
    assert ended(first)
    loader.close()
    assert ended(second)
    assert samples_of(next(iter(loader))) == take(loader_of_epoch(1), 1)[0]
    third = {child.pid for child in multiprocessing.active_children()}
    assert len(third) == 2
    del loader
    gc.collect()
    assert ended(third)


def test_workers_fetch_ahead_over_the_epochs_end():
    dataset = Counting(NUM_SAMPLES)
    loader = SlotLoader(dataset, sampler_of(), num_workers=1)
    assert [step.step for step in loader] == list(range(NUM_STEPS))
    deadline = time.monotonic() + 20
    while dataset.loaded.value <= NUM_STEPS * GLOBAL_BATCH_SIZE and time.monotonic() < deadline:
        time.sleep(0.02)
    assert dataset.loaded.value > NUM_STEPS * GLOBAL_BATCH_SIZE
    assert (loader.epoch, loader.step) == (1, 0)
    loader.close()


def raised_by(loader):
    with pytest.raises(LoadingError) as caught:
        list(loader)
    return str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_sample_is_named_and_does_not_move_the_position(num_workers):
    sampler = sampler_of()
    bad = sampler.batch(0, 2, 5)[1]
    loader = SlotLoader(Broken(NUM_SAMPLES, bad, ValueError("bad pixels")), sampler, num_workers=num_workers)
    message = (
        rf"dataset\[{bad}\] raised ValueError: bad pixels \(\S+:\d+ in __getitem__\); repair that sample or leave it "
        r"out \(it is in the microbatch of epoch=0, step=2, slot=5\)"
    )
    assert re.fullmatch(message, raised_by(loader))
    assert (loader.epoch, loader.step) == (0, 2)
    assert re.fullmatch(message, raised_by(loader))


def uncollatable(samples):
    raise RuntimeError("stack expects\neach tensor to be equal size")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_that_cannot_be_collated_is_named(num_workers):
    loader = loader_of(num_workers=num_workers, collate_fn=uncollatable)
    indices = ", ".join(map(str, loader.sampler.batch(0, 0, 0)))
    raised, place, rest = re.split(r" \((\S+:\d+ in uncollatable)\), ", raised_by(loader))
    assert raised == "uncollatable raised RuntimeError: stack expects each tensor to be equal size"
    assert "test_data_loader.py:" in place
    assert rest == (
        f"collating the microbatch of epoch=0, step=0, slot=0 (dataset indices {indices}); give all samples one shape "
        "and type, or set a collate function that accepts them as they are"
    )


def draw_while_collating(samples):
    return torch.tensor([index for index, _, _ in samples]), torch.rand(len(samples), 1), torch.tensor([0])


def test_what_a_collate_function_draws_is_seeded_too():
    here, there = (take(loader_of(num_workers=n, collate_fn=draw_while_collating), 2) for n in (0, 2))
    assert here == there


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_over_ranks_is_the_evaluation_of_one(num_workers):
    dataset = Augmented(23)
    alone = [(number, samples_of([batch])) for number, batch in evaluation_loader(dataset, 5, seed=1)]
    assert [number for number, _ in alone] == [0, 1, 2, 3, 4]
    assert [index for _, [(indices, _)] in alone for index in indices] == list(range(23))
    shares = [evaluation_loader(dataset, 5, rank, 7, seed=1, num_workers=num_workers) for rank in range(7)]
    assert [(number, samples_of([batch])) for share in shares for number, batch in share] == alone


OPTIONS = [name for name in inspect.signature(DataLoader).parameters if name != "shuffle"]


class Remembering(DataLoader):
    def __init__(self, note, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.note = note


def test_an_updated_dataloader_keeps_class_and_options():
    batches = BatchSampler(SequentialSampler(range(10)), 4, drop_last=False)
    original = Remembering(
        "kept",
        list(range(10)),
        batch_size=3,
        num_workers=1,
        collate_fn=list,
        timeout=7,
        worker_init_fn=print,
        multiprocessing_context="spawn",
        generator=torch.Generator().manual_seed(3),
        prefetch_factor=5,
        persistent_workers=True,
        pin_memory_device="cpu",
        in_order=False,
    )
    updated = update_dataloader(original, ReproducibleBatchSampler(batches))
    assert type(updated) is Remembering
    assert updated.note == "kept"
    for name in OPTIONS:
        if name not in ("batch_sampler", "batch_size", "drop_last"):
            assert getattr(updated, name) is getattr(original, name), name
    assert updated.multiprocessing_context.get_start_method() == "spawn"
    assert (updated.batch_sampler.batch_sampler, updated.batch_size, updated.drop_last) == (batches, None, False)
    assert original.batch_size == 3


def test_an_updated_dataloader_yields_the_new_batches():
    original = DataLoader(list(range(10)), batch_size=3, collate_fn=list, num_workers=1, persistent_workers=True)
    assert len(list(original)) == 4
    updated = update_dataloader(original, BatchSampler(SequentialSampler(range(10)), 4, drop_last=True))
    assert list(updated) == list(updated) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(updated) == 2
    assert list(original) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


def test_iterable_data_has_no_batch_sampler():
    class Numbers(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    with pytest.raises(ValueError, match="expected a DataLoader over a map-style dataset"):
        update_dataloader(DataLoader(Numbers()), BatchSampler(range(3), 1, False))
