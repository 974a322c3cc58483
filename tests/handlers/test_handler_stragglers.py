"""A slow rank is reported by rank, host and slow activity; ranks that are alike are not reported."""

import logging
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.engine import Engine
from disttrain.handlers.stragglers import COMPUTING, FACTOR, FEWEST_STEPS, LOADING, Stragglers, Work, find_stragglers

WINDOW_S = 10.0


def work(loading_s: float, computing_s: float | None, num_slots: int = 1, num_steps: int = 100) -> Work:
    took_s = {LOADING: loading_s} | ({} if computing_s is None else {COMPUTING: computing_s})
    return Work("host-a", num_slots, num_steps, took_s)


@pytest.mark.parametrize(
    ("by_rank", "slow"),
    [
        ([work(1, 4), work(5, 4)], [(1, LOADING)]),
        ([work(1, 4), work(1, 9)], [(1, COMPUTING)]),
        ([work(1, 4), work(1, 4), work(0.5, 8), work(4, 4)], [(2, COMPUTING), (3, LOADING)]),
        (
            [work(1, None), work(4, None), work(1, None)],
            [(1, LOADING)],
        ),  # the computing time is unknown
        ([work(0, 0), work(3, 0)], [(1, LOADING)]),
        ([work(1, 4), work(1, 6)], []),  # 1.4 times
        ([work(0.1, None), work(0.9, None)], []),  # 9 times, but that costs less than a tenth of the run
        ([work(2, 4, num_slots=1), work(4, 8, num_slots=2)], []),  # twice the work for twice the slots
        ([work(2, 2, num_slots=1), work(4, 4, num_slots=1)], [(1, LOADING)]),
        ([work(1, 4), work(5, 5), work(5, 5)], []),  # most ranks are as slow
        ([work(1, 9)], []),
        ([work(0, 0, num_steps=0), work(0, 0, num_steps=0)], []),
    ],
)
def test_slow_ranks_are_found_with_their_activity(by_rank: list[Work], slow: list[tuple[int, str]]) -> None:
    assert [(found.rank, found.activity) for found in find_stragglers(by_rank, WINDOW_S)] == slow


@given(st.lists(st.floats(1.0, 1.0 * FACTOR), min_size=1, max_size=9), st.integers(1, 4))
def test_ranks_that_are_alike_are_not_reported(slot_s: list[float], num_slots: int) -> None:
    assert find_stragglers([work(s * num_slots, s * num_slots, num_slots) for s in slot_s], WINDOW_S) == []


def test_the_message() -> None:
    (found,) = find_stragglers([work(0.1, 4), replace(work(4.1, 4), host="host-b"), work(0.1, 4)], WINDOW_S)
    assert found.text == (
        "rank 1 on host-b is slow: loading its data takes 41.0 ms a step, 41.0 times the others' 1.0 ms; "
        "they wait 40.0 ms a step for it"
    )


def test_a_rank_that_stays_slow_is_shown_once_and_logged_in_each_window(caplog: pytest.LogCaptureFixture) -> None:
    shown: list[str] = []
    rank_0 = Stragglers(0, 1, loading_s=lambda: 0.0, waited_s=None, window_s=0.0, tell=shown.append)
    even, slow = [work(1, None, num_steps=4)] * 2, [work(1, None, num_steps=4), work(9e9, None, num_steps=4)]
    with caplog.at_level(logging.WARNING):
        for by_rank in (slow, *[slow] * 6, *[even] * 3, *[slow] * 2):  # the first is ignored; three fill a window
            rank_0.receive(by_rank)
        assert [text.partition(" on ")[0] for text in shown] == ["rank 1"]
        assert len(caplog.messages) == 2
        rank_0.receive(slow)
    assert len(shown) == 2  # it was not slow in the window before
    assert FEWEST_STEPS > 8


def test_a_payload_holds_the_work_since_the_last_payload() -> None:
    loading, waited = iter([0.5, 0.75]), iter([0.0, 0.0])
    clocks = Stragglers(
        1, 3, loading_s=lambda: next(loading), waited_s=lambda: next(waited), window_s=0.0, tell=lambda text: None
    )
    engine = Engine(lambda engine, batch: sum(range(1000)))
    clocks.attach(engine)
    engine.run(range(4), max_epochs=1)
    first, second = clocks.payload(), clocks.payload()
    assert (first.num_slots, first.num_steps, first.took_s[LOADING]) == (3, 4, 0.5)
    assert (second.num_steps, second.took_s) == (0, {LOADING: 0.25, COMPUTING: 0.0})
    assert first.took_s[COMPUTING] > 0
    clocks.receive([first, second])  # rank 0 alone reports
