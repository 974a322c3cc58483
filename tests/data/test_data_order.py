"""The plain orders, numbers for each sample, and the sampler and the loader over an order."""

import numpy as np
import pytest
import torch
from augmented_data import Augmented, take
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.data import (
    IndexShuffle,
    LengthBuckets,
    Mixture,
    Sequential,
    Shuffled,
    SlotBatchSampler,
    SlotLoader,
    Sources,
    Weighted,
)
from disttrain.data.order import count, per_sample
from disttrain.errors import ConfigError, DataError
from disttrain.seeding import seed_for

DATA = Sources({"a": range(40), "b": range(31)})
SIZE = len(DATA)
ORDERS = {
    "shuffled": Shuffled,
    "sequential": Sequential,
    "weighted": lambda *given: Weighted(*given, weights=np.arange(SIZE), num_samples=90),
    "buckets": lambda *given: LengthBuckets(*given, lengths=np.arange(SIZE) % 7, window=3),
    "mixture": lambda *given: Mixture(*given, shares={"a": 0.25, "b": 0.75}, changes={4: {"a": 1}}),
    "odd mixture": lambda *given: Mixture(*given, shares={"a": 0.254321, "b": 0.7512345}),
}


def sampler_of(name, slots=None):
    return SlotBatchSampler(SIZE, 12, 4, seed=7, slots=slots, order=ORDERS[name](DATA, 7, 12))


def test_shuffled_is_the_order_of_a_sampler_without_one():
    with_one, without = (SlotBatchSampler(SIZE, 12, 4, seed=7, order=order) for order in (Shuffled(DATA, 7, 12), None))
    for epoch in (0, 5):
        assert with_one.samples(epoch, range(5)).tolist() == without.samples(epoch, range(5)).tolist()
        shuffle = IndexShuffle(SIZE, seed_for(7, "order", epoch))
        assert without.samples(epoch, range(5)).ravel().tolist() == shuffle[:60].tolist()
    assert (with_one.num_samples, with_one.num_steps, with_one.num_dropped) == (SIZE, 5, 11)


def test_sequential_is_the_data_as_it_is():
    assert sampler_of("sequential").samples(3, range(1, 3)).tolist() == [[*range(12, 24)], [*range(24, 36)]]


@pytest.mark.parametrize("name", ORDERS)
def test_a_position_has_one_index_whatever_else_is_asked_for(name):
    order = ORDERS[name](DATA, 7, 12)
    for epoch in (0, 1, 10**6):
        whole = order.at(epoch, np.arange(len(order)))
        assert whole.shape == (len(order),)
        assert whole.min() >= 0
        assert whole.max() < SIZE
        backwards = ORDERS[name](DATA, 7, 12)
        assert [int(backwards.at(epoch, np.array([i]))[0]) for i in reversed(range(len(order)))] == whole[::-1].tolist()
        mixed = np.random.default_rng(1).permutation(len(order))
        assert order.at(epoch, mixed).tolist() == whole[mixed].tolist()


@pytest.mark.parametrize("name", [name for name in ORDERS if name != "sequential"])
def test_seeds_and_epochs_have_orders_of_their_own(name):
    orders = {tuple(ORDERS[name](DATA, seed, 12).at(epoch, np.arange(60))) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(ORDERS)), st.integers(1, 4), st.integers(0, 40), st.integers(0, 3))
def test_any_split_over_ranks_from_any_step_gives_the_batches_of_one_rank(name, world_size, epoch, step):
    alone = sampler_of(name).samples(epoch, range(step, step + 2)).reshape(2, 4, 3).tolist()
    for rank in range(world_size):
        slots = range(4 * rank // world_size, 4 * (rank + 1) // world_size)
        mine = sampler_of(name, slots)
        mine.seek(epoch, step)
        batches = iter(mine)
        got = [[list(next(batches)) for _ in slots] for _ in range(2)]
        assert got == [[each[slot] for slot in slots] for each in alone]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_over_an_order_goes_on_from_its_state(num_workers):
    def loader_of(order, **options):
        return SlotLoader(Augmented(SIZE), SlotBatchSampler(SIZE, 12, 4, seed=7, order=order), **options)

    whole = take(loader_of(ORDERS["mixture"](DATA, 7, 12)), 8)
    first = loader_of(ORDERS["mixture"](DATA, 7, 12))
    assert take(first, 3) == whole[:3]
    second = loader_of(ORDERS["mixture"](DATA, 7, 12), num_workers=num_workers)
    second.load_state_dict(first.state_dict())
    assert take(second, 5) == whole[3:]
    second.close()
    for other in (None, ORDERS["weighted"](DATA, 7, 12)):
        with pytest.raises(DataError, match=r"the batches would be others than before: .*order_fingerprint"):
            loader_of(other).load_state_dict(first.state_dict())
    with pytest.raises(DataError, match=r"the batches would be others than before: .*order_fingerprint"):
        second.load_state_dict(loader_of(None).state_dict())


def test_a_loader_says_what_an_epoch_leaves_out():
    loader = SlotLoader(DATA, sampler_of("weighted"))
    assert loader.notes == [
        "each epoch leaves out the last 6 of the order's 90 positions: they fill no global batch of 12"
    ]
    assert len(loader) == 7
    assert SlotLoader(DATA, sampler_of("mixture")).notes == []


def test_an_order_shorter_than_a_step_is_refused():
    with pytest.raises(DataError, match=r"at least global_batch_size=12 samples \(one step\), got an order of 7; use"):
        SlotBatchSampler(SIZE, 12, 4, order=Weighted(DATA, 7, 12, weights=[1] * SIZE, num_samples=7))


def test_numbers_for_each_sample():
    for numbers in (
        [1, 2, 3],
        (1, 2, 3),
        np.array([1, 2, 3]),
        torch.tensor([1, 2, 3]),
        lambda data: [len(data) - 2, 2, 3],
    ):
        assert per_sample("weights", numbers, range(3)).tolist() == [1, 2, 3]
    for numbers, got in (
        ([1, 2], r"got an array of shape \(2,\); give one for each sample"),
        ([[1, 2, 3]], r"got an array of shape \(1, 3\)"),
        (7, r"got an array of shape \(\)"),
        ([1, -2, 3], "got -2.0 for sample 1; repair it or leave that sample out"),
        ([1, 2, float("nan")], "got nan for sample 2"),
        ([1, 2, float("inf")], "got inf for sample 2"),
        (["a", "b", "c"], "got a list .ValueError: could not convert string to float: 'a'."),
    ):
        message = f"^order.lengths: expected a number of at least 0 for each of the 3 samples, {got}"
        with pytest.raises(ConfigError, match=message):
            per_sample("lengths", numbers, range(3))


def test_counts_are_integers_above_0():
    assert count("window", np.int64(3), "global batches") == 3
    for wrong in (0, -1, 2.0, True, "3"):
        with pytest.raises(
            ConfigError, match=f"^order.window: expected a number of global batches, at least 1, got {wrong!r}"
        ):
            count("window", wrong, "global batches")
