"""Who holds the others up is named, by rank, host and what it is slow at; ranks that are alike are not."""

import logging
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.engine import Engine
from disttrain.observe.stragglers import COMPUTING, FACTOR, FEWEST_STEPS, LOADING, Stragglers, Work, stragglers

WINDOW_S = 10.0


def work(loading_s: float, computing_s: float | None, num_slots: int = 1, num_steps: int = 100) -> Work:
    took_s = {LOADING: loading_s} | ({} if computing_s is None else {COMPUTING: computing_s})
    return Work("host-a", num_slots, num_steps, took_s)


@pytest.mark.parametrize(
    ("by_rank", "named"),
    [
        ([work(1, 4), work(5, 4)], [(1, LOADING)]),
        ([work(1, 4), work(1, 9)], [(1, COMPUTING)]),
        ([work(1, 4), work(1, 4), work(0.5, 8), work(4, 4)], [(2, COMPUTING), (3, LOADING)]),
        ([work(1, None), work(4, None), work(1, None)], [(1, LOADING)]),  # an accelerator, whose time nobody knows
        ([work(0, 0), work(3, 0)], [(1, LOADING)]),
        ([work(1, 4), work(1, 6)], []),  # 1.4 times
        ([work(0.1, None), work(0.9, None)], []),  # 9 times, but that costs less than a tenth of the run
        ([work(2, 4, num_slots=1), work(4, 8, num_slots=2)], []),  # twice the work, as it has twice the slots
        ([work(2, 2, num_slots=1), work(4, 4, num_slots=1)], [(1, LOADING)]),
        ([work(1, 4), work(5, 5), work(5, 5)], []),  # most are as slow: nobody knows better
        ([work(1, 9)], []),
        ([work(0, 0, num_steps=0), work(0, 0, num_steps=0)], []),
    ],
)
def test_who_is_slow_and_at_what(by_rank: list[Work], named: list[tuple[int, str]]) -> None:
    assert [(found.rank, found.what) for found in stragglers(by_rank, WINDOW_S)] == named


@given(st.lists(st.floats(1.0, 1.0 * FACTOR), min_size=1, max_size=9), st.integers(1, 4))
def test_ranks_that_are_alike_are_not_named(each: list[float], num_slots: int) -> None:
    assert stragglers([work(s * num_slots, s * num_slots, num_slots) for s in each], WINDOW_S) == []


def test_it_is_told_in_words() -> None:
    (found,) = stragglers([work(0.1, 4), replace(work(4.1, 4), host="host-b"), work(0.1, 4)], WINDOW_S)
    assert found.text == (
        "rank 1 on host-b is slow: loading its data takes 41.0 ms a step, 41.0 times the others' 1.0 ms; "
        "they wait 40.0 ms a step for it"
    )


def test_a_rank_that_stays_slow_is_told_once_and_logged_in_each_window(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []
    listening = Stragglers(0, 1, loading_s=lambda: 0.0, waited_s=None, window_s=0.0, tell=told.append)
    even, slow = [work(1, None, num_steps=4)] * 2, [work(1, None, num_steps=4), work(9e9, None, num_steps=4)]
    with caplog.at_level(logging.WARNING):
        for heard in (slow, *[slow] * 6, *[even] * 3, *[slow] * 2):  # the first does not count; three fill a window
            listening.hear(heard)
        assert [text.partition(" on ")[0] for text in told] == ["rank 1"]
        assert len(caplog.messages) == 2
        listening.hear(slow)
    assert len(told) == 2  # it had been well meanwhile
    assert FEWEST_STEPS > 8


def test_a_rank_tells_what_it_did_since_it_last_told() -> None:
    loading, waited = iter([0.5, 0.75]), iter([0.0, 0.0])
    clocks = Stragglers(
        1, 3, loading_s=lambda: next(loading), waited_s=lambda: next(waited), window_s=0.0, tell=lambda text: None
    )
    engine = Engine(lambda engine, batch: sum(range(1000)))
    clocks.attach(engine)
    engine.run(range(4), max_epochs=1)
    first, second = clocks.say(), clocks.say()
    assert (first.num_slots, first.num_steps, first.took_s[LOADING]) == (3, 4, 0.5)
    assert (second.num_steps, second.took_s) == (0, {LOADING: 0.25, COMPUTING: 0.0})
    assert first.took_s[COMPUTING] > 0
    clocks.hear([first, second])  # rank 0 alone judges
