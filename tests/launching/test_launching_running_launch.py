"""An agent that comes later finds the agents that run already, where there is room; at a real store."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore

from disttrain.launching.generations import AgreementStore
from disttrain.launching.membership import asks, finished, refused, started
from disttrain.launching.procedures import Watch, change, watch_over
from disttrain.launching.running_launch import agreement_of, join_running

RANK = "one/0.1"


class Handler:
    """The part of a rendezvous handler that is used here."""

    def __init__(self, store: Any, most: int = 2) -> None:
        self.store, self.most = store, most

    def get_run_id(self) -> str:
        return "digits"


@pytest.fixture
def handler() -> Handler:
    return Handler(TCPStore("localhost", 0, is_master=True, wait_for_workers=False))


def met(handler: Handler, meeting: str = "1") -> AgreementStore:
    """Return where agents agree that have met, of which one has started a rank."""
    place = AgreementStore(agreement_of(handler, PrefixStore(meeting, handler.store), True, 1.0))
    place.run(change(started, "one", [RANK]))
    place.run(change(asks, RANK))
    return place


@pytest.fixture
def signs() -> Iterator[list[AgreementStore]]:
    """Gives signs of life of the host "one" in the agreements of the list."""
    places: list[AgreementStore] = []
    over = threading.Event()

    def give() -> None:
        watch, looks = Watch(1.0), 0
        while not over.wait(0.05):
            looks += 1
            for place in places:
                place.run(watch_over("one", str(looks), watch, []))

    thread = threading.Thread(target=give)
    thread.start()
    yield places
    over.set()
    thread.join()


def test_the_first_agents_find_nobody(handler: Handler) -> None:
    assert join_running(handler, 1.0) is None


def test_agents_that_meet_agree_at_one_place_and_those_that_meet_anew_at_another(handler: Handler) -> None:
    first, again = PrefixStore("1", handler.store), PrefixStore("2", handler.store)
    where = agreement_of(handler, first, True, 1.0)
    assert agreement_of(handler, first, False, 1.0) == where
    assert agreement_of(handler, again, True, 1.0) != where


def test_one_that_comes_later_joins_those_that_run(handler: Handler, signs: list[AgreementStore]) -> None:
    met(handler)
    place = met(handler, "2")  # after a restart of all
    signs.append(AgreementStore(place._where))
    assert join_running(handler, 1.0) == place._where


@pytest.mark.parametrize("how", ["dead", "finished", "restarts"])
def test_nobody_joins_what_does_not_run(handler: Handler, signs: list[AgreementStore], how: str) -> None:
    place = met(handler)
    if how == "finished":
        place.run(change(finished, RANK))
    if how == "restarts":
        place.run(change(refused, "no copy is left"))
    if how != "dead":
        signs.append(AgreementStore(place._where))
    assert join_running(handler, 1.0) is None


def test_a_host_too_many_waits_for_room(handler: Handler, signs: list[AgreementStore]) -> None:
    place = met(handler)
    place.run(change(started, "two", ["two/0.1"]))
    signs.append(AgreementStore(place._where))
    assert join_running(handler, 1.0) == place._where
    assert place.state().away == ("two/0.1",)  # nothing was heard of it, so there is room
