"""StreamReader: units, requests and parts; the samples of a slot are a function of pass, step and slot."""

import itertools
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamed_data import NUM_SLOTS, SIZES, Iterators, Numbers, Remembering, RememberingShards, Shards, Shuffling

from disttrain.data import LoadingError
from disttrain.data.stream_reader import Request, Requests, StreamReader, Unit

MICROBATCH_SIZE = 2


def reader_of(dataset, mine=range(NUM_SLOTS)):
    return StreamReader(dataset, MICROBATCH_SIZE, NUM_SLOTS, mine, seed=3, collate_fn=None)


def step_of(reader, step, kept=True):
    return [reader.__getitems__(Request(unit, step, kept)) for unit in range(len(reader.units))]


def numbers_of(parts):
    return [x[:, 1].tolist() for part in parts for x, _, _ in part.batches]


def draws_of(parts):
    return [draws.tolist() for part in parts for _, draws, _ in part.batches]


def test_a_slot_with_a_shard_is_a_unit_and_any_other_stream_is_one():
    assert reader_of(Shards(), range(1, 3)).units == [Unit(range(1, 2), range(1, 2)), Unit(range(2, 3), range(2, 3))]
    assert reader_of(Numbers(), range(1, 3)).units == [Unit(range(NUM_SLOTS), range(1, 3))]


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 9), st.integers(0, 4))
def test_requests_go_through_the_units_step_by_step(num_units, num_more, first_step, num_dropped):
    per_step = num_units + num_more
    requests = Requests(num_units, per_step, first_step, num_dropped)
    for iterable in (requests, requests):  # a DataLoader makes two iterators
        got = list(itertools.islice(iterable, 6 * per_step))
        for position, request in enumerate(got):
            number, unit = divmod(position, per_step)
            expected = Request(unit, first_step + number, number >= num_dropped)
            assert request == (expected if unit < num_units else None)


def test_the_empty_request_and_a_dropped_step_have_no_batches():
    reader = reader_of(Shards())
    assert reader.__getitems__(None) is None
    assert [part[:2] for part in step_of(reader, 0, kept=False)] == [([], None)] * NUM_SLOTS
    starts = [sum(SIZES[:slot]) for slot in range(NUM_SLOTS)]
    assert numbers_of(step_of(reader, 1)) == [[start + 2, start + 3] for start in starts]


@pytest.mark.parametrize("kind", [Shards, Numbers, Shuffling])
def test_reading_other_slots_makes_no_difference(kind):
    whole, one = reader_of(kind()), reader_of(kind(), range(2, 3))
    for step in range(3):
        assert draws_of(step_of(one, step)) == draws_of(step_of(whole, step))[2:3]


def test_a_stream_that_ends_says_how_many_samples_were_left():
    reader = reader_of(Shards((2, 3, 4, 1)))
    assert [(part.batches is None, part.num_left) for part in step_of(reader, 0)] == [
        (False, 0),
        (False, 0),
        (False, 0),
        (True, 1),
    ]
    whole = reader_of(Numbers((9,)))
    step_of(whole, 0)
    assert step_of(whole, 1) == [(None, None, 1)]


@pytest.mark.parametrize("kind", [Remembering, RememberingShards, Iterators])
@pytest.mark.parametrize("step", [1, 2])
def test_a_state_leads_back_to_its_step(kind, step):
    first, resumed = reader_of(kind()), reader_of(kind())
    parts = [step_of(first, number) for number in range(3)]
    states = {unit.slots.start: part.state for unit, part in zip(first.units, parts[step - 1], strict=True)}
    resumed.begin(0, pickle.loads(pickle.dumps(states)))
    again = [step_of(resumed, number) for number in range(step, 3)]
    assert [numbers_of(each) for each in again] == [numbers_of(each) for each in parts[step:]]
    assert [draws_of(each) for each in again] == [draws_of(each) for each in parts[step:]]


def test_a_new_pass_begins_at_the_start_and_has_its_own_draws():
    reader = reader_of(Remembering())
    first = [step_of(reader, step) for step in range(2)]
    reader.begin(1, {})
    second = [step_of(reader, step) for step in range(2)]
    assert [numbers_of(parts) for parts in second] == [numbers_of(parts) for parts in first]
    assert draws_of(second[0]) != draws_of(first[0])
    assert {epoch for part in second[0] for x, _, _ in part.batches for epoch in x[:, 0].tolist()} == {1}


def test_a_shard_that_cannot_be_opened_is_named():
    class Missing(Shards):
        def shard(self, num_shards, index):
            if index == 2:
                raise FileNotFoundError("part-2.tar")
            return super().shard(num_shards, index)

    message = r"^train_data.shard\(4, 2\) raised FileNotFoundError: part-2.tar \(\S+ in shard\), when"
    with pytest.raises(LoadingError, match=message):
        step_of(reader_of(Missing()), 0)
