"""The steps by which ranks agree, answered from a variable."""

from typing import Any

import pytest

from disttrain.errors import LeftOutError, RunIsOverError, TooFewLeftError
from disttrain.launching.membership import asks, decode, died, encode, finished, refused, started
from disttrain.launching.procedures import (
    Announce,
    Beat,
    Beats,
    Now,
    Procedure,
    Read,
    Swap,
    Wait,
    Watch,
    change,
    end_of,
    join,
    leave,
    watch_over,
)

A, B = "one/0.1", "one/1.2"


class Stored:
    """The text of a store; `meanwhile` is run before the first swap, as what somebody else does."""

    def __init__(self, text: str = "") -> None:
        self.text, self.time, self.announced = text, 0.0, {}
        self.meanwhile: list[Procedure] = []
        self.signs: dict[str, str] = {}

    def run(self, procedure: Procedure) -> Any:
        answer: Any = None
        while True:
            try:
                question = procedure.send(answer)
            except StopIteration as done:
                return done.value
            match question:
                case Read():
                    answer = self.text
                case Swap(expected, desired):
                    others, self.meanwhile = self.meanwhile, []
                    for other in others:
                        self.run(other)
                    self.text = answer = desired if self.text == expected else self.text
                case Announce(number, reason):
                    answer = self.announced.setdefault(number, reason)
                case Beat(host, sign):
                    self.signs[host] = sign
                case Beats(hosts):
                    answer = [self.signs.get(host, "") for host in hosts]
                case Now():
                    answer = self.time
                case Wait(text, at_most_s):
                    self.time += at_most_s
                    answer = text


def test_an_event_that_somebody_elses_overtook_is_applied_to_what_is_there() -> None:
    stored = Stored()
    stored.run(change(started, "one", [A]))
    stored.meanwhile = [change(asks, A)]
    state = stored.run(change(started, "two", ["two/0.1"]))
    assert (state.number, state.members, state.alive) == (1, (A,), (A, "two/0.1"))


def test_the_end_of_a_generation_is_announced_once_and_the_beginning_is_none() -> None:
    stored = Stored()
    stored.run(change(started, "one", [A, B]))
    stored.run(change(asks, A))
    assert stored.run(join(B, 5.0)).members == (A, B)
    assert stored.announced == {}
    stored.run(change(died, B, "B was killed"))
    assert stored.run(leave(A, 1, 3, "lost a peer", 5.0)).number == 2
    assert stored.announced == {1: "B was killed"}


def test_who_waits_goes_on_without_those_who_do_not_come_in_time() -> None:
    stored = Stored()
    stored.run(change(started, "one", [A, B]))
    stored.run(change(asks, A))
    stored.run(join(B, 5.0))
    assert stored.run(leave(A, 1, 3, "lost a peer", 5.0)).members == (A,)
    assert stored.time == 5.0
    with pytest.raises(LeftOutError, match="generation 2: lost a peer"):
        stored.run(leave(B, 1, 3, "woke up", 5.0))


def test_in_the_beginning_nobody_goes_on_without_another() -> None:
    stored = Stored()
    stored.run(change(started, "one", [A, B]))
    with pytest.raises(TooFewLeftError, match=f"expected every rank within 5 s, got nothing from {B}"):
        stored.run(join(A, 5.0))
    with pytest.raises(TooFewLeftError, match=f"got nothing from {B}"):
        stored.run(join(B, 5.0))
    alone = Stored()
    alone.run(change(started, "one", [A], 2))
    with pytest.raises(TooFewLeftError, match="got nothing from 1 more hosts"):
        alone.run(join(A, 5.0))


def test_why_a_generation_is_over() -> None:
    state = asks(started(decode(""), "one", [A]), A)
    assert end_of(state, 1) is None
    assert end_of(asks(started(state, "one", [B]), B), 1) == f"{B} joins"
    assert end_of(refused(state, "refused"), 1) == "refused"
    stored = Stored(encode(state))
    assert stored.run(leave(A, 1, 3, "broken", 5.0)).number == 2
    assert end_of(decode(stored.text), 1) == "broken"
    stored.run(leave(A, 2, 3, "again", 5.0))
    assert end_of(decode(stored.text), 1) == "the generations after it have begun"


def test_who_shows_no_new_sign_for_the_silence_is_quiet_and_a_pause_of_ones_own_counts_for_nobody() -> None:
    watch = Watch(4.0)
    for now in (0.0, 1.0, 2.0, 3.0):
        assert watch.quiet(now, {"a": f"{now}", "b": "the same"}) == []
    assert watch.quiet(4.0, {"a": "x", "b": "the same", "c": "new"}) == ["b"]
    assert watch.quiet(9.0, {"a": "x", "b": "the same"}) == []  # this process was stopped for 5 s
    for now in (10.0, 11.0, 12.0):
        assert watch.quiet(now, {"a": "x", "b": f"{now}"}) == []
    assert watch.quiet(13.0, {"a": "x", "b": "13"}) == ["a"]


def test_an_agent_leaves_out_a_host_that_is_silent_and_a_rank_that_is_stopped() -> None:
    far = "two/0.1"
    stored = Stored()
    for name in (A, B, far):
        stored.run(change(started, name.rpartition("/")[0], [name], 2))
    for name in (A, B, far):
        stored.run(change(asks, name))
    watch, state = Watch(4.0), decode(stored.text)
    for look in range(4):
        stored.time += 1.5
        stored.signs["two"] = f"{look}"
        state = stored.run(watch_over("one", f"{look}", watch, [B]))
    assert (state.ended, state.away) == (f"nothing was heard of {B} for 4 s", (B,))
    for look in range(4):
        stored.time += 1.5
        state = stored.run(watch_over("one", f"more {look}", watch, [B]))
    assert state.away == (B, far)
    assert stored.run(leave(A, 1, 3, "lost", 5.0)).members == (A,)


def test_one_that_has_taken_no_state_is_told_when_the_others_have_finished() -> None:
    stored = Stored()
    stored.run(change(started, "one", [A, B]))
    stored.run(change(asks, A))
    stored.run(join(B, 5.0))
    stored.run(change(finished, A))
    with pytest.raises(RunIsOverError):
        stored.run(leave(B, 1, None, "lost a peer", 5.0))
