"""Laws of the samplers: every split over ranks, and every resume, gives the microbatches of one whole run."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, SequentialSampler

from disttrain.data import EvaluationBatchSampler, ReproducibleBatchSampler, SlotBatchSampler


@st.composite
def runs(draw):
    """Return (num_samples, global_batch_size, num_slots, seed, shuffle) of a sound run."""
    num_slots = draw(st.integers(1, 12))
    global_batch_size = num_slots * draw(st.integers(1, 5))
    num_samples = draw(st.integers(global_batch_size, 4 * global_batch_size + 7) | st.just(2**16 + global_batch_size))
    return num_samples, global_batch_size, num_slots, draw(st.integers(0, 2**63 - 1)), draw(st.booleans())


def sampler_of(run, slots=None):
    num_samples, global_batch_size, num_slots, seed, shuffle = run
    return SlotBatchSampler(num_samples, global_batch_size, num_slots, seed=seed, slots=slots, shuffle=shuffle)


def content(batch):
    return list(batch), batch.seed, batch.epoch, batch.step, batch.slot


@settings(deadline=None)
@given(runs(), st.integers(0, 10**6))
def test_an_epoch_is_cut_into_disjoint_slots(run, epoch):
    num_samples, global_batch_size, num_slots, _, shuffle = run
    sampler = sampler_of(run)
    steps = range(min(sampler.num_steps, 5))
    batches = [sampler.batch(epoch, step, slot) for step in steps for slot in range(num_slots)]
    assert {len(batch) for batch in batches} == {global_batch_size // num_slots}
    indices = [index for batch in batches for index in batch]
    assert len(set(indices)) == len(indices)
    assert all(0 <= index < num_samples for index in indices)
    assert sampler.num_steps * global_batch_size + sampler.num_dropped == num_samples
    assert shuffle or indices == list(range(len(indices)))
    assert len({batch.seed for batch in batches}) == len(batches)


@settings(deadline=None)
@given(runs(), st.integers(0, 50), st.data())
def test_any_split_over_ranks_gives_the_run_of_one_rank(run, epoch, data):
    num_slots = run[2]
    world_size = data.draw(st.integers(1, num_slots))
    alone = sampler_of(run)
    step = data.draw(st.integers(0, min(alone.num_steps - 1, 3)))
    count = 2 * num_slots
    expected = [content(batch) for batch in itertools.islice(alone.stream(epoch, step), count)]
    assert [key[2:] for key in expected[:num_slots]] == [(epoch, step, slot) for slot in range(num_slots)]
    got = []
    for rank in range(world_size):
        slots = range(num_slots * rank // world_size, num_slots * (rank + 1) // world_size)
        mine = sampler_of(run, slots).stream(epoch, step)
        got += [content(batch) for batch in itertools.islice(mine, 2 * len(slots))]
    assert sorted(got, key=lambda key: key[2:]) == expected


@settings(deadline=None)
@given(runs(), st.integers(0, 9), st.data())
def test_a_pass_is_what_batch_says(run, epoch, data):
    sampler = sampler_of(run)
    first = data.draw(st.integers(max(0, sampler.num_steps - 4), sampler.num_steps - 1))
    sampler.seek(epoch, first)
    expected = [sampler.batch(epoch, step, slot) for step in range(first, sampler.num_steps) for slot in sampler.slots]
    assert [content(batch) for batch in sampler] == [content(batch) for batch in expected]
    assert (sampler.epoch, sampler.step) == (epoch + 1, 0)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.data())
def test_starting_late_leaves_out_the_first_batches_of_one_pass(num_samples, batch_size, drop_last, data):
    batches = BatchSampler(SequentialSampler(range(num_samples)), batch_size, drop_last)
    start = data.draw(st.integers(0, len(batches) + 1))
    sampler = ReproducibleBatchSampler(batches, start_iteration=start)
    assert list(sampler) == list(batches)[start:]
    assert list(sampler) == list(batches)
    assert len(sampler) == len(batches)


@settings(deadline=None)
@given(runs(), st.data())
def test_starting_late_over_slots_is_the_same_as_skipping(run, data):
    first = max(0, run[0] // run[1] - 5)
    slots = range(data.draw(st.integers(1, run[2])))
    whole, late = sampler_of(run, slots), sampler_of(run, slots)
    whole.seek(3, first)
    late.seek(3, first)
    expected = [content(batch) for batch in whole]
    start = data.draw(st.integers(0, len(expected) + 1))
    sampler = ReproducibleBatchSampler(late, start_iteration=start)
    assert [content(batch) for batch in sampler] == expected[start:]
    assert next(iter(sampler)).epoch == 4
    assert len(sampler) == len(whole)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 30), st.integers(1, 12), st.integers(0, 99))
def test_evaluation_sees_every_sample_once_on_any_number_of_ranks(num_samples, batch_size, world_size, seed):
    alone = [(b.number, list(b), b.seed) for b in EvaluationBatchSampler(num_samples, batch_size, seed=seed)]
    ranks = [EvaluationBatchSampler(num_samples, batch_size, r, world_size, seed=seed) for r in range(world_size)]
    assert [(b.number, list(b), b.seed) for rank in ranks for b in rank] == alone
    assert [index for _, indices, _ in alone for index in indices] == list(range(num_samples))
    assert {len(indices) for _, indices, _ in alone[:-1]} <= {batch_size}
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
