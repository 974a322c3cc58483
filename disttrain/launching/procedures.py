"""The steps by which ranks and agents agree, as generators that ask others for the store and the time.

*Contract*: a procedure yields a question and is sent its answer. `generations.py` and the agent answer from a real
store; the simulator of the tests answers from one with a simulated clock, with answers that get lost. So what the
simulator tries is what runs. A procedure may be asked a `Swap` again whose answer was lost: events can be applied twice
(membership.py). It asks for nothing else that a second try would change.

*Errors*: LeftOutError, RunIsOverError and TooFewLeftError, from the procedures that wait for a generation.
"""

from collections.abc import Callable, Collection, Generator, Mapping
from typing import Any, NamedTuple

from disttrain.errors import LeftOutError, RunIsOverError, TooFewLeftError
from disttrain.launching.membership import Agreement, Generation, asks, decode, encode, host_of, left, overdue, silent

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


class Beat(NamedTuple):
    """Put a sign of life of a host into the store; no answer."""

    host: str
    sign: str


class Beats(NamedTuple):
    """The last signs of life of hosts, in their order; "" for one that has given none."""

    hosts: tuple[str, ...]


class Wait(NamedTuple):
    """Wait until the store may hold another text than `text`, at most so long; the answer is what it holds then."""

    text: str
    at_most_s: float


Question = Read | Swap | Announce | Now | Beat | Beats | Wait
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


def leave(name: str, generation: int, step: int | None, reason: str, patience_s: float) -> Procedure:
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
        if waited >= patience_s and (state.missing or state.number == 0 or state.ended is None):
            absent = ", ".join(state.missing) or (
                "others that start" if state.number else f"{state.hosts - len(state.came)} more hosts"
            )
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
    # Those that wait without a state have nothing to do either.
    idle = {*state.finished, *state.away, *(other for other, step in state.ready.items() if step is None)}
    if state.finished and not any(other in state.alive and other not in idle for other in state.members):
        raise RunIsOverError("the other ranks have finished the run")
    if name not in state.ready:
        raise LeftOutError(f"the others went on without {name}, as generation {state.number}: {state.reason}")
    return None


class Watch:
    """Counts for how long others have shown no new sign of life; a pause of this process's own counts for nobody."""

    def __init__(self, silence_s: float) -> None:
        self.silence_s = silence_s
        self._looked: float | None = None
        self._seen: dict[str, tuple[str, float]] = {}

    def quiet(self, now: float, signs: Mapping[str, str]) -> list[str]:
        """Return those whose sign has stayed the same for `silence_s`; `signs` has the last sign of each."""
        if self._looked is None or now - self._looked > self.silence_s / 2:
            self._seen = {}  # this process itself was stopped, or cut off: others may have given signs meanwhile
        self._looked = now
        self._seen = {
            name: (sign, self._seen[name][1] if name in self._seen and self._seen[name][0] == sign else now)
            for name, sign in signs.items()
        }
        return [name for name, (_, since) in self._seen.items() if now - since >= self.silence_s]


def watch_over(host: str, sign: str, watch: Watch, stopped: Collection[str]) -> Procedure:
    """Give a sign of life of this host, and leave out who gives none: other hosts, and the `stopped` ranks of this one.

    Return the state after it.
    """
    yield Beat(host, sign)
    state = decode((yield Read()))
    hosts = tuple(other for other in state.came if other != host)
    signs: list[str] = yield Beats(hosts)
    own = [name for name in state.alive if host_of(name) == host]
    now: float = yield Now()
    lives = {name: "stopped" if name in stopped else sign for name in own}
    quiet = watch.quiet(now, {**dict(zip(hosts, signs, strict=True)), **lives})
    names = [name for name in state.alive if name in quiet or host_of(name) in quiet]
    if any(name not in (*state.finished, *state.away) for name in names):
        reason = f"nothing was heard of {', '.join(quiet)} for {watch.silence_s:g} s"
        state = yield from change(silent, names, reason)
    return state
