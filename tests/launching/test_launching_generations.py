"""Members of threads of this process, at a real store: who meets whom, and how a store that is lost ends a wait."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from torch.distributed import TCPStore

from disttrain.errors import LeftOutError, RunIsOverError, TooFewLeftError
from disttrain.launching.generations import AgreementStore, Member
from disttrain.launching.membership import Generation, died, silent, started
from disttrain.launching.procedures import announce, change
from disttrain.launching.recovery_variables import Recovery

HOST = "one:1"
NAMES = [f"{HOST}/{rank}.{rank + 1}" for rank in range(3)]
Start = Any  # calls a function in a thread of its own, and returns the future of its result


@pytest.fixture
def start() -> Iterator[Start]:
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit


@pytest.fixture
def agent() -> Iterator[AgreementStore]:
    """The agent's access to the state, in which three ranks have been started."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = AgreementStore(Recovery("localhost", store.port, "run", "", 2.0))
    place.run(change(started, HOST, NAMES))
    yield place
    for number in range(5):
        place.run(announce(number, "the test ends"))  # or listeners would print that their store is lost
    time.sleep(0.1)
    del store


def members_of(agent: AgreementStore) -> list[Member]:
    return [Member(replace(agent._where, member=name)) for name in NAMES]


def met(waits: list[Future[Generation]]) -> list[Generation]:
    return [wait.result(20) for wait in waits]


def test_survivors_meet_and_one_that_joins_meets_them(agent: AgreementStore, start: Start) -> None:
    one, two, three = members_of(agent)
    first = met([start(member.first) for member in (one, two, three)])
    assert first == [first[0]] * 3
    assert (first[0].number, set(first[0].members), first[0].source) == (1, set(NAMES), None)
    assert [member.ended(first[0]) for member in (one, two, three)] == [None] * 3

    heard: list[tuple[int, str]] = []
    one.when_ended = lambda number, reason: heard.append((number, reason))
    agent.run(change(died, two.name, "two was killed"))
    deadline = time.monotonic() + 20
    while one.ended(first[0]) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert one.ended(first[0]) == "two was killed"
    while not heard:
        time.sleep(0.01)
    assert heard == [(1, "two was killed")]
    one.when_ended = None
    second = met([start(one.leave, first[0], "lost", 7), start(three.leave, first[0], "lost", 8)])
    assert second == [Generation(2, (one.name, three.name), "two was killed", (7, 8))] * 2
    assert [member.ended(second[0]) for member in (one, three)] == [None] * 2
    assert (one.topology(second[0]).rank, three.topology(second[0]).rank) == (0, 1)
    assert three.topology(second[0]).world_size == 2
    one.store(second[0]).set("key", "met")
    assert three.store(second[0]).get("key") == b"met"

    agent.run(change(started, HOST, [f"{HOST}/1.9"]))
    new = Member(replace(agent._where, member=f"{HOST}/1.9"))
    joins = start(new.first)
    while (why := three.ended(second[0])) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert why == f"{new.name} joins"
    third = met([joins, start(one.leave, second[0], why, 9), start(three.leave, second[0], why, 9)])
    assert third == [Generation(3, (one.name, three.name, new.name), why, (9, 9, None))] * 3
    assert not three.store(third[0]).check(["key"])


def test_a_member_without_which_the_others_went_on_may_join_anew(agent: AgreementStore, start: Start) -> None:
    members = members_of(agent)
    first = met([start(member.first) for member in members])[0]
    agent.run(change(silent, [NAMES[1]], "silent"))
    second = met([start(members[rank].leave, first, "lost", 3) for rank in (0, 2)])[0]
    with pytest.raises(LeftOutError, match=r"the others went on without one:1/1.2, as generation 2: silent"):
        members[1].leave(first, "woke up", 3)
    again = start(members[1].first)
    while members[0].ended(second) is None:
        time.sleep(0.01)
    third = met([start(members[rank].leave, second, "one joins", 5) for rank in (0, 2)])
    assert again.result(20) == third[0]
    assert third[0].steps[third[0].members.index(NAMES[1])] is None


def test_a_member_that_waits_too_long_goes_on_without_those_that_do_not_come(
    agent: AgreementStore, start: Start
) -> None:
    members = members_of(agent)
    first = met([start(member.first) for member in members])[0]
    second = members[0].leave(first, "lost", 3, patience_s=0.2)
    assert second.members == (NAMES[0],)
    assert second.reason == "lost"


def test_a_refusal_reaches_those_that_wait_and_those_that_run(agent: AgreementStore, start: Start) -> None:
    members = members_of(agent)
    first = met([start(member.first) for member in members])[0]
    waits = start(members[0].leave, first, "lost", 3)
    members[1].refuse("no copy of the shards is left")
    with pytest.raises(TooFewLeftError, match=r"^no copy of the shards is left$"):
        waits.result(20)
    while members[2].ended(first) is None:
        time.sleep(0.01)


def test_ranks_that_do_not_come_at_the_beginning_are_an_error(agent: AgreementStore) -> None:
    with pytest.raises(
        TooFewLeftError, match=r"expected every rank within 0.1 s, got nothing from one:1/1.2, one:1/2.3"
    ):
        members_of(agent)[0].first(patience_s=0.1)


def test_one_that_comes_after_the_end_is_told_so(agent: AgreementStore, start: Start) -> None:
    members = members_of(agent)
    met([start(member.first) for member in members])
    agent.run(change(died, NAMES[1], "killed"))
    agent.run(change(started, HOST, [f"{HOST}/1.9"]))
    late = start(Member(replace(agent._where, member=f"{HOST}/1.9")).first)
    time.sleep(0.05)
    for rank in (0, 2):
        members[rank].finish()
    with pytest.raises(RunIsOverError):
        late.result(20)


def test_a_lost_store_ends_the_wait() -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = AgreementStore(Recovery("localhost", store.port, "run", NAMES[0], 1.0))
    place.run(change(started, HOST, NAMES[:1]))
    member = Member(place._where)
    first = member.first()
    del store
    with pytest.raises(TooFewLeftError, match=r"expected the store at localhost:.*, got no answer"):
        member.leave(first, "lost", 3)
