"""The steps by which ranks and agents agree, as generators that ask others for the store and the time.

*Contract*: a procedure yields a question and is sent its answer. `generations.py` and the agent answer from a real
store; the simulator of the tests answers from one with a simulated clock, with answers that get lost. So what the
simulator tries is what runs. A procedure may be asked a `Swap` again whose answer was lost: events can be applied twice
(membership.py). It asks for nothing else that a second try would change.

*Errors*: LeftOutError, RunIsOverError and TooFewLeftError, from the procedures that wait for a generation.
"""

from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from disttrain.errors import LeftOutError, RunIsOverError, TooFewLeftError
from disttrain.launching.membership import Agreement, Generation, asks, decode, encode, left, overdue

RETRY_S = 1.0


class Read(NamedTuple):
    """The state's text in the store; "" before anybody has written it."""


class Swap(NamedTuple):
    """Put `desired` into the store if it holds `expected`; the answer is what it holds then."""

    expected: str
    desired: str


class Announce(NamedTuple):
    """Wake those who wait for the end of a generation. Nothing depends on it but time; no answer."""

    number: int
    reason: str


class Now(NamedTuple):
    """Seconds of a clock that never goes back."""


class Wait(NamedTuple):
    """Wait until the store may hold another text than `text`, at most so long; the answer is what it holds then."""

    text: str
    at_most_s: float


Question = Read | Swap | Announce | Now | Wait
Procedure = Generator[Question, Any, Any]


def change(event: Callable[..., Agreement], *arguments: Any) -> Procedure:
    """Apply an event of membership.py to the state in the store; return the state after it."""
    text: str = yield Read()
    while True:
        before = decode(text)
        after = event(before, *arguments)
        if after == before:
            return after
        desired = encode(after)
        text = yield Swap(text, desired)
        if text == desired:
            if before.ended is None and before.restart is None and (reason := end_of(after, before.number)) is not None:
                yield Announce(before.number, reason)
            return after


def announce(number: int, reason: str) -> Procedure:
    """Announce the end of a generation; whoever ended it may have died before it did so."""
    yield Announce(number, reason)


def end_of(state: Agreement, number: int) -> str | None:
    """Return why generation `number` has ended, or None while it goes on."""
    if state.restart is not None or state.number == number:
        return state.restart or state.ended
    return state.reason if state.number == number + 1 else "the generations after it have begun"


def join(name: str, patience_s: float) -> Procedure:
    """Ask to be in the next generation without holding a state; wait for it and return it."""
    state: Agreement = yield from change(asks, name)
    return (yield from _next(name, state.number - (name in state.members), patience_s))


def leave(name: str, generation: int, step: int, reason: str, patience_s: float) -> Procedure:
    """Say that `generation` is over for this member, which has committed `step`; wait for the next and return it."""
    yield from change(left, name, generation, step, reason)
    return (yield from _next(name, generation, patience_s))


def _next(name: str, number: int, patience_s: float) -> Procedure:
    """Wait for the generation after `number` that holds this member.

    Members for whom the others have waited `patience_s` are left out by whoever has waited so long.
    """
    began: float = yield Now()
    text: str = yield Read()
    while True:
        state = decode(text)
        if (generation := _found(state, name, number)) is not None:
            return generation
        waited = (yield Now()) - began
        if waited >= patience_s and (state.missing or state.number == 0):
            absent = ", ".join(state.missing) or f"{state.hosts - len(state.came)} more hosts"
            reason = f"expected every rank within {patience_s:g} s, got nothing from {absent}"
            text = encode((yield from change(overdue, state.number, reason)))
        else:
            text = yield Wait(text, patience_s - waited if waited < patience_s else RETRY_S)


def _found(state: Agreement, name: str, number: int) -> Generation | None:
    """Return the generation after `number` if it holds this member, None if it is still to come."""
    if state.restart is not None:
        raise TooFewLeftError(state.restart)
    if state.number > number and name in state.members:
        return state.generation
    if name not in state.ready:
        if state.finished and not any(other in state.alive and other not in state.finished for other in state.members):
            raise RunIsOverError("the other ranks have finished the run")
        raise LeftOutError(f"the others went on without {name}, as generation {state.number}: {state.reason}")
    if state.finished and not state.missing and state.ended is not None:
        raise RunIsOverError("the other ranks have finished the run")
    return None
