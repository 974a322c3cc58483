"""Laws of streams: passes of any length, resumed at any step in any of the three ways, give the same run."""

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.data import StreamLoader

COUNT = 7


class Parts:
    """Parts with sizes that change with the pass; a sample is (part, number, a random draw)."""

    def __init__(self, sizes, own=None):
        self.sizes = sizes
        self.own = own
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def sizes_of(self, epoch):
        return [size + epoch * (i + 1) % 3 for i, size in enumerate(self.sizes)]

    def __iter__(self):
        for part, size in enumerate(self.sizes_of(self.epoch)):
            for number in range(size) if self.own in (None, part) else ():
                yield part, number, random.random()


class Sharded(Parts):
    def shard(self, num_shards, index):
        return Parts(self.sizes, index)


@st.composite
def runs(draw):
    """Return (stream, global_batch_size, num_slots) of a run that has a step in each pass."""
    num_slots = draw(st.integers(1, 5))
    size = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(size, 4 * size + 3), min_size=num_slots, max_size=num_slots))
    return draw(st.sampled_from([Parts, Sharded]))(sizes), size * num_slots, num_slots


def loader_of(run, slots=None):
    stream, global_batch_size, num_slots = run
    return StreamLoader(stream, global_batch_size, num_slots, seed=5, slots=slots, collate_fn=list, digest=repr)


def take(loader, count=COUNT):
    steps = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    return [(batch.epoch, batch.step, list(batch)) for batch in itertools.islice(steps, count)]


def steps_in(run, epoch):
    """Return the number of steps in a pass."""
    stream, global_batch_size, num_slots = run
    if isinstance(stream, Sharded):
        return min(stream.sizes_of(epoch)) // (global_batch_size // num_slots)
    return sum(stream.sizes_of(epoch)) // global_batch_size


@settings(deadline=None)
@given(runs())
def test_a_pass_has_the_steps_that_every_slot_has_samples_for(run):
    positions = [(epoch, step) for epoch in range(COUNT) for step in range(steps_in(run, epoch))]
    assert [(epoch, step) for epoch, step, _ in take(loader_of(run))] == positions[:COUNT]


@settings(deadline=None)
@given(runs())
def test_each_sample_is_read_once_in_a_pass_and_in_order(run):
    steps = take(loader_of(run))
    for epoch in {epoch for epoch, _, _ in steps}:
        by_slot = zip(*(batch for e, _, batch in steps if e == epoch), strict=True)
        slots = [[sample[:2] for microbatch in slot for sample in microbatch] for slot in by_slot]
        if isinstance(run[0], Sharded):
            assert slots == [[(part, number) for number in range(len(slot))] for part, slot in enumerate(slots)]
        else:
            run[0].set_epoch(epoch)
            whole = [sample[:2] for sample in run[0]]
            read = sorted(itertools.chain.from_iterable(slots))
            assert read == whole[: len(read)]


@settings(deadline=None)
@given(runs(), st.integers(0, COUNT - 1))
def test_going_on_from_any_step_gives_the_run_in_one_go(run, step):
    expected = take(loader_of(run))
    loader = loader_of(run)
    take(loader, step)
    saved, resumed = loader.state_dict(), loader_of(run)
    resumed.load_state_dict(saved)
    assert take(resumed, COUNT - step) == expected[step:]
    for position in ((0, step), expected[step][:2]):
        sought = loader_of(run)
        sought.seek(*position)
        assert take(sought, COUNT - step) == expected[step:]
    loader.close()
    assert take(loader, COUNT - step) == expected[step:]


@settings(deadline=None)
@given(runs(), st.data())
def test_a_slot_holds_the_same_whoever_owns_it(run, data):
    slot = data.draw(st.integers(0, run[2] - 1))
    alone = loader_of(run, range(slot, slot + 1))
    count = min(steps_in(run, 0), COUNT)
    expected = [microbatches[slot] for _, _, microbatches in take(loader_of(run), count)]
    assert [microbatches[0] for _, _, microbatches in take(alone, count)] == expected
