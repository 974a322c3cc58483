"""The clocks and counts of a run's position: pauses are not timed, and each epoch starts at zero."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from disttrain.engine.cursor import Cursor


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 100

    def __call__(self) -> int:
        return self.now


@contextmanager
def clock() -> Iterator[Clock]:
    with patch("disttrain.engine.cursor.perf_counter", Clock()) as replaced:
        yield replaced


seconds = st.integers(0, 1000)


@given(st.lists(st.tuples(seconds, seconds), max_size=5), st.lists(st.tuples(seconds, seconds), max_size=5))
def test_clocks_count_the_time_that_is_not_paused(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> None:
    with clock() as time:
        cursor = Cursor(started_at=time())
        for parts in (before, after):
            for run_s, pause_s in parts:
                time.now += run_s
                cursor.pause()
                assert cursor.paused
                time.now += pause_s
                cursor.resume()
                assert not cursor.paused
            if parts is before:
                cursor.begin_epoch()
        epoch_s = sum(run_s for run_s, _ in after)
        assert time() - cursor.epoch_started_at == epoch_s
        assert time() - cursor.started_at == epoch_s + sum(run_s for run_s, _ in before)


def test_before_the_first_epoch_its_clock_is_0() -> None:
    with clock() as time:
        cursor = Cursor(started_at=time())
        cursor.pause()
        time.now += 5
        cursor.resume()
        assert cursor.epoch_started_at == 0


def test_an_epoch_starts_with_no_batch_and_no_end_of_data() -> None:
    cursor = Cursor(started_at=0.0, count=3, empty_at=2)
    cursor.begin_epoch()
    assert (cursor.count, cursor.empty_at) == (0, -1)
