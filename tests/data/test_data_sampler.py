"""The samplers in a DataLoader, their positions, seeds and errors. Their laws are in tests/properties."""

import doctest
import itertools
import pickle

import pytest
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

import disttrain.data
from disttrain.data import (
    EvaluationBatchSampler,
    IndexShuffle,
    Microbatch,
    ReproducibleBatchSampler,
    SlotBatchSampler,
)
from disttrain.errors import ConfigError, DataError
from disttrain.seeding import seed_for


def test_a_microbatch_is_a_part_of_the_epochs_order_with_its_own_seed():
    sampler = SlotBatchSampler(100, 12, 4, seed=7)
    batch = sampler.batch(epoch=5, step=2, slot=3)
    order = IndexShuffle(100, seed_for(7, "order", 5))
    assert batch == order.indices(2 * 12 + 3 * 3, 3 * 12).tolist()
    assert all(type(index) is int for index in batch)
    assert batch.seed == seed_for(7, "batch", 5, 2, 3)
    assert (batch.epoch, batch.step, batch.slot) == (5, 2, 3)


def test_the_example_in_the_rooms_docstring_is_right():
    result = doctest.testmod(disttrain.data)
    assert result.attempted > 5
    assert result.failed == 0


def test_a_microbatch_travels_whole():
    batch = SlotBatchSampler(100, 12, 4).batch(5, 2, 3)
    there = pickle.loads(pickle.dumps(batch))
    assert type(there) is Microbatch
    assert there == batch
    assert vars(there) == vars(batch)


def test_each_epoch_and_seed_has_its_own_order():
    orders = {tuple(SlotBatchSampler(50, 50, seed=seed).batch(epoch, 0, 0)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_sizes_of_an_epoch():
    sampler = SlotBatchSampler(107, 20, 4, slots=range(1, 3))
    assert (sampler.num_steps, sampler.num_dropped, len(sampler), sampler.batch_size) == (5, 7, 10, 5)
    assert isinstance(sampler, BatchSampler)


def test_passes_go_from_epoch_to_epoch_and_start_again_where_one_was_left():
    sampler = SlotBatchSampler(40, 20, 2)
    assert [(b.epoch, b.step, b.slot) for b in sampler] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert [(b.epoch, b.step) for b in itertools.islice(sampler, 3)] == [(1, 0), (1, 0), (1, 1)]
    assert next(iter(sampler)).epoch == 1
    sampler.seek(3, 1)
    assert [(b.epoch, b.step, b.slot) for b in sampler] == [(3, 1, 0), (3, 1, 1)]
    assert (sampler.epoch, sampler.step) == (4, 0)
    sampler.seek(6, 2)
    assert (sampler.epoch, sampler.step) == (7, 0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_in_a_plain_dataloader(num_workers):
    sampler = SlotBatchSampler(40, 10, 2, seed=1)
    loader = DataLoader(range(40), batch_sampler=sampler, num_workers=num_workers, collate_fn=list)
    assert len(loader) == 8
    expected = [[list(sampler.batch(e, s, v)) for s in range(4) for v in range(2)] for e in range(2)]
    assert [list(loader), list(loader)] == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_late_start_in_a_dataloader_holds_for_one_pass(num_workers):
    batches = BatchSampler(SequentialSampler(range(20)), 3, drop_last=False)
    sampler = ReproducibleBatchSampler(batches, start_iteration=5)
    loader = DataLoader(range(20), batch_sampler=sampler, num_workers=num_workers, collate_fn=list)
    assert list(loader) == [[15, 16, 17], [18, 19]]
    assert list(loader) == list(batches)
    assert len(loader) == 7


def test_skipping_takes_indices_one_at_a_time():
    taken = []

    class Endless:
        def __iter__(self):
            for index in itertools.count():
                taken.append(index)
                yield index

    sampler = ReproducibleBatchSampler(BatchSampler(Endless(), 10, drop_last=True), start_iteration=100)
    assert next(iter(sampler)) == list(range(1000, 1010))
    assert taken == list(range(1010))


def test_what_the_wrapped_sampler_says_stays_readable():
    inner = BatchSampler(RandomSampler(range(10)), 4, drop_last=True)
    sampler = ReproducibleBatchSampler(inner)
    assert isinstance(sampler, BatchSampler)
    assert (sampler.sampler, sampler.batch_size, sampler.drop_last) == (inner.sampler, 4, True)
    assert (sampler.batch_sampler, sampler.start_iteration) == (inner, None)


def test_only_batch_samplers_are_wrapped():
    with pytest.raises(TypeError, match=r"expected a torch.utils.data.BatchSampler, got RandomSampler; wrap"):
        ReproducibleBatchSampler(RandomSampler(range(10)))
    with pytest.raises(ValueError, match="got -1"):
        ReproducibleBatchSampler(SlotBatchSampler(10, 2), start_iteration=-1)


def test_more_ranks_than_evaluation_batches():
    ranks = [EvaluationBatchSampler(5, 2, rank, 5) for rank in range(5)]
    assert [len(rank) for rank in ranks] == [0, 1, 0, 1, 1]
    assert [[(b.number, list(b)) for b in rank] for rank in ranks if len(rank)] == [
        [(0, [0, 1])],
        [(1, [2, 3])],
        [(2, [4])],
    ]


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((0, 8, 2), DataError, "the dataset is empty: expected at least one global batch of samples, got 0; check"),
        (
            (7, 8, 2),
            DataError,
            "at least global_batch_size=8 samples .one step., got a dataset of 7; use a global_batch_size of at most 6",
        ),
        ((3, 8, 4), DataError, "got a dataset of 3; use a num_slots of at most 3, or more data"),
        ((500, 100, 8), ConfigError, "global_batch_size=100 cannot be cut into num_slots=8 equal slots; use 96 or 104"),
        ((500, 3, 8), ConfigError, "cannot be cut into num_slots=8 equal slots; use 8"),
        ((500, 0, 8), ConfigError, "global_batch_size >= 1 and num_slots >= 1; got global_batch_size=0, num_slots=8"),
    ],
)
def test_sizes_that_do_not_fit(sizes, error, message):
    with pytest.raises(error, match=message):
        SlotBatchSampler(*sizes)


@pytest.mark.parametrize("slots", [range(0), range(3, 5), range(-1, 2), range(0, 4, 2)])
def test_slots_that_do_not_exist(slots):
    with pytest.raises(ValueError, match=r"expected slots to be a part of range\(4\)"):
        SlotBatchSampler(100, 8, 4, slots=slots)


def test_positions_that_do_not_exist():
    sampler = SlotBatchSampler(100, 8, 4)
    for epoch, step in ((-1, 0), (0, -1), (0, 13)):
        with pytest.raises(ValueError, match=f"there is no epoch={epoch}, step={step}"):
            sampler.seek(epoch, step)
    for position in ((0, 12, 0), (0, 0, 4), (0, 0, -1), (-1, 0, 0)):
        with pytest.raises(ValueError, match="there is no epoch="):
            sampler.batch(*position)
    with pytest.raises(ValueError, match="got rank=2, world_size=2"):
        EvaluationBatchSampler(5, 2, 2, 2)
    with pytest.raises(DataError, match="the evaluation dataset is empty"):
        EvaluationBatchSampler(0, 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_batches_that_belong_together_lie_on_one_rank(world_size: int) -> None:
    alone = [(each.number, list(each), each.seed) for each in EvaluationBatchSampler(23, 2, seed=3)]
    ranks = [EvaluationBatchSampler(23, 2, rank, world_size, seed=3, num_together=4) for rank in range(world_size)]
    assert [(each.number, list(each), each.seed) for rank in ranks for each in rank] == alone
    assert all(len(rank) == len(list(rank)) for rank in ranks)
    owners = [{number // 4 for number in rank.numbers} for rank in ranks]
    assert sum(map(len, owners)) == 3  # groups of 4, 4 and 4 batches, of which no two ranks have a part
