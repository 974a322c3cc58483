"""A mistake that ended a launch is known to its next attempts, and to no other launch."""

from collections.abc import Callable

import pytest

from disttrain.backend.ended_before import mistake_before, remember_mistake
from disttrain.backend.stores import open_store

Attempt = Callable[..., None]


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """A function that makes this process a rank of an attempt, at a store that lives as long as the test."""
    store = open_store(0, 20.0)

    def begin(restarts: int, rank: int = 0, *, has_store: bool = True) -> None:
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_RESTART_COUNT": restarts,
            "TORCHELASTIC_USE_AGENT_STORE": has_store,
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return begin


def test_the_next_attempts_of_a_launch_know_its_mistake(attempt: Attempt) -> None:
    attempt(0)
    assert not mistake_before()
    remember_mistake()
    for restarts in (1, 2):
        for rank in (0, 1):
            attempt(restarts, rank)
            assert mistake_before()


def test_an_attempt_after_a_failure_that_may_pass_begins(attempt: Attempt) -> None:
    attempt(0)
    assert not mistake_before()
    attempt(1)
    assert not mistake_before()


def test_another_launch_at_the_same_store_begins(attempt: Attempt) -> None:
    attempt(1)
    remember_mistake()
    attempt(0, rank=1)
    assert not mistake_before()
    attempt(0)
    assert not mistake_before()
    attempt(1)
    assert not mistake_before()


def test_without_a_store_nothing_is_known(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(1, has_store=False)
    remember_mistake()
    assert not mistake_before()
    monkeypatch.delenv("MASTER_ADDR")  # half-set variables are reported where the ranks connect
    assert not mistake_before()
