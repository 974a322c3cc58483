"""StreamRanks: one process without others, a single backend and several ranks keep the same two promises."""

import pytest
from thread_ranks import in_threads

from disttrain.backend import connect
from disttrain.data.ranks import OneRank


def answers(ranks, flags, value):
    """Return the answer to each flag, all asked before the first is awaited, and the gathered values."""
    waits = [ranks.start_any(flag) for flag in flags]
    return [wait() for wait in waits], ranks.all_gather(value)


@pytest.mark.parametrize("value", [None, 3, "text", {0: {"stream": [1, 2]}}])
def test_one_rank_answers_as_a_single_backend_does(value):
    expected = ([True, False], [value])
    assert answers(OneRank(), [True, False], value) == expected
    with connect("single") as backend:
        assert answers(backend, [True, False], value) == expected


def test_any_is_true_if_it_is_on_one_of_several_ranks():
    flags = {0: [False, False, True], 1: [False, True, True], 2: [False, False, True]}
    results = in_threads(3, lambda backend: answers(backend, flags[backend.rank], {backend.rank: "state"}))
    assert results == [([False, True, True], [{0: "state"}, {1: "state"}, {2: "state"}])] * 3
