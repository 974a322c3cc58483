"""Passes: the steps of a stream pass after pass, the same end on all ranks, and errors that come at their step."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import in_threads

from disttrain.data import LoadingError
from disttrain.data.fetching import Fetching
from disttrain.data.passes import Passes, gather_by_slot
from disttrain.data.ranks import OneRank
from disttrain.data.stream_reader import StreamReader
from disttrain.errors import DataError


class Lines:
    """Yields the numbers of a pass, whose length depends on the pass; the bad number raises an error."""

    def __init__(self, lengths, bad=None):
        self.lengths = lengths
        self.bad = bad
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for number in range(self.lengths[self.epoch % len(self.lengths)]):
            if (self.epoch, number) == self.bad:
                raise ValueError("bad line")
            yield number


class StatefulLines(Lines):
    """Keeps its position, but a state leads `offset` lines too far."""

    at = 0
    offset = 0

    def __iter__(self):
        for number in range(self.at, self.lengths[self.epoch % len(self.lengths)]):
            self.at = number + 1
            yield number
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"] + self.offset


def passes_of(dataset, ranks=None, accept_other_data=False):
    """Return the Passes over `dataset` in this process, with one slot of one sample in each step."""
    reader = StreamReader(dataset, 1, 1, range(1), seed=0, collate_fn=list)
    fetching = Fetching(reader, num_workers=0, pin_memory=False)
    return Passes(reader, fetching, 0, ranks or OneRank(), accept_other_data=accept_other_data)


def drop_steps(passes):
    """Read the steps that are to be dropped; return their number."""
    passes.make_ready()
    number = passes.to_drop
    for _ in range(number):
        assert [part.batches for part in passes.advance()] == [[]]
        passes.make_ready()
    assert passes.to_drop == 0
    return number


def next_step(passes):
    """Return (pass, step, steps before the pass, sample) of the next step."""
    drop_steps(passes)
    position = passes.epoch, passes.step, passes.steps_before
    (part,) = passes.advance()
    return *position, part.batches[0][0]


def expected_steps(lengths):
    """Yield the steps of endless passes of these lengths."""
    before = 0
    for epoch in itertools.count():
        length = lengths[epoch % len(lengths)]
        yield from ((epoch, step, before, step) for step in range(length))
        before += length


lengths = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=25)
@given(lengths)
def test_each_step_of_each_pass_comes_once_and_in_order(lengths):
    passes = passes_of(Lines(lengths))
    assert [next_step(passes) for _ in range(7)] == list(itertools.islice(expected_steps(lengths), 7))


@settings(max_examples=25)
@given(lengths, st.integers(0, 7))
def test_steps_to_drop_may_reach_into_later_passes(lengths, to_drop):
    passes = passes_of(Lines(lengths))
    passes.go_to(0, 0, steps_before=0, to_drop=to_drop)
    assert next_step(passes) == next(itertools.islice(expected_steps(lengths), to_drop, None))


def test_a_pass_ends_on_all_ranks_where_the_first_one_has_no_more():
    sizes = {0: [5, 3], 1: [2, 4], 2: [4, 2]}

    def read(ranks):
        passes = passes_of(Lines(sizes[ranks.rank]), ranks)
        return [next_step(passes) for _ in range(6)]

    expected = [(0, 0, 0, 0), (0, 1, 0, 1), (1, 0, 2, 0), (1, 1, 2, 1), (2, 0, 4, 0), (2, 1, 4, 1)]
    assert in_threads(3, read) == [expected] * 3


def test_an_error_comes_at_its_step_and_again_when_the_step_is_asked_for_again():
    passes = passes_of(Lines([4], bad=(0, 2)))
    assert [next_step(passes)[3] for _ in range(2)] == [0, 1]
    for num_dropped in (0, 2):  # after the error the pass is read again
        assert drop_steps(passes) == num_dropped
        assert (passes.epoch, passes.step) == (0, 2)
        with pytest.raises(LoadingError, match="bad line"):
            passes.advance()


def test_states_resume_inside_a_pass_and_are_discarded_if_they_lead_past_a_known_step():
    lines = StatefulLines([4])
    passes = passes_of(lines)
    for _ in range(2):
        next_step(passes)
    states = passes.states
    assert states == {0: {"stream": {"at": 2}}}
    for offset, discarded in ((0, False), (2, True)):
        other = StatefulLines([4])
        other.offset = offset
        resumed = passes_of(other)
        resumed.go_to(0, 2, steps_before=0)
        resumed.states, resumed.known_step = states, 2
        assert drop_steps(resumed) == (2 if discarded else 0)
        assert next_step(resumed) == (0, 2, 0, 2)


@pytest.mark.parametrize("accept", [False, True])
def test_a_pass_that_has_become_shorter_is_an_error_unless_it_is_accepted(accept):
    passes = passes_of(Lines([3]), accept_other_data=accept)
    passes.go_to(0, 3, steps_before=0)
    passes.known_step = 3
    if accept:
        assert next_step(passes) == (1, 0, 3, 0)
    else:
        with pytest.raises(DataError, match="pass 0 ends after 3 steps, expected more than 3, as before"):
            next_step(passes)


def test_a_pass_without_a_step_is_an_error():
    passes = passes_of(Lines([2, 0]))
    with pytest.raises(DataError, match=r"^pass 1 of the training data has no step: expected at least 1 samples"):
        [next_step(passes) for _ in range(3)]


def test_the_values_of_all_ranks_are_gathered_by_slot_or_none_at_all():
    values = {0: {0: "a", 1: "b"}, 1: {2: "c"}}
    assert in_threads(2, lambda ranks: gather_by_slot(ranks, values[ranks.rank])) == [{0: "a", 1: "b", 2: "c"}] * 2
    assert in_threads(2, lambda ranks: gather_by_slot(ranks, values[0] if ranks.rank else None)) == [None] * 2
    assert gather_by_slot(OneRank(), {5: "d"}) == {5: "d"}
