"""The agreement of ranks and agents on who is in the run: pure functions from (state, event) to the next state.

*Contract*: one `Agreement` is kept in a store that outlives every rank. Whoever has something to say (a rank, the agent
of a host) reads it, applies one function of this file, and writes the result by compare-and-set. So all events have one
order, a generation of one number is committed once, and the rank that says the last word commits it. Each function may
be applied twice (the answer of a store can be lost) without another effect than once.

*The rules*:

- A *generation* is a numbered list of members. Its steps need all of them, so none goes on once one has left it.
- It ends when a member dies, is silent, leaves it, or when somebody asks to join. The first reason is kept.
- The next one is committed as soon as every member that still lives has left, with the step that it has committed.
- It holds at least one survivor, because the others take the state from the survivors. Survivors' steps differ by one
  at most: who is at the step that broke has either updated or not. Without both, the run is restarted from its
  checkpoint, as without recovery.
- A member that was left out (silent for too long) can only come back as one that joins.

No majority is asked for: a member that was left out cannot do another step, since its generation's steps need those
that have gone on without it.

*Cost*: a state is some hundred bytes a rank.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

BEGINS = "the run begins"


@dataclass(frozen=True)
class Generation:
    """The members of the run from one moment on, in the order of their ranks.

    `reason` is why the generation before ended. `steps` has the step that each member has committed; None for one that
    holds no state of the run, because it joins.
    """

    number: int
    members: tuple[str, ...]
    reason: str = BEGINS
    steps: tuple[int | None, ...] = ()

    @property
    def step(self) -> int | None:
        """The furthest committed step, from which the run goes on; None where nobody holds a state (the beginning)."""
        return max((step for step in self.steps if step is not None), default=None)

    @property
    def source(self) -> int | None:
        """The rank that gives its state to those who need it: the first at the furthest step; None without one."""
        return None if self.step is None else self.steps.index(self.step)

    @property
    def behind(self) -> tuple[int, ...]:
        """The ranks that take the state of `source`: they joined, or have not done the furthest step."""
        return tuple(rank for rank, step in enumerate(self.steps) if step != self.step)


@dataclass(frozen=True)
class Agreement:
    """All that is agreed on. `ended` is why generation `number` is over, None while it goes on.

    `hosts` agents begin the run, and `came` are those that have said which ranks they start; with fewer than `least` of
    them the run waits for others, as without recovery. `alive` are the ranks that
    were started and have not been seen to end. `ready` are those that wait for the next generation, with the committed
    step (None: joins). `away` are silent ones, `finished` those that have done all their work. `restart`: why the run
    cannot go on in place.
    """

    number: int = 0
    members: tuple[str, ...] = ()
    steps: tuple[int | None, ...] = ()
    reason: str = BEGINS
    ended: str | None = BEGINS
    hosts: int = 1
    least: int = 1
    came: tuple[str, ...] = ()
    alive: tuple[str, ...] = ()
    ready: Mapping[str, int | None] = field(default_factory=dict)
    away: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()
    restart: str | None = None

    @property
    def generation(self) -> Generation:
        return Generation(self.number, self.members, self.reason, self.steps)

    @property
    def missing(self) -> tuple[str, ...]:
        """Those for whom the next generation still waits; none while a generation goes on."""
        if self.ended is None:
            return ()
        gone = {*self.ready, *self.finished, *self.away}
        return tuple(name for name in self.alive if name not in gone and (name in self.members or not self.number))


def encode(state: Agreement) -> str:
    """Return a state as text; the same state gives the same text."""
    return json.dumps(asdict(state), sort_keys=True)


def decode(text: str) -> Agreement:
    """Return the state that `encode` wrote; "" is the state before anybody has said anything."""
    read: dict[str, Any] = json.loads(text or "{}")
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}
    return Agreement(**fields)


def host_of(name: str) -> str:
    """Return the agent of a member: the part before the last slash."""
    return name.rpartition("/")[0]


def started(state: Agreement, host: str, names: Iterable[str], hosts: int = 1, least: int = 1) -> Agreement:
    """The agent of a host has started ranks; `hosts` agents begin the run together, and it needs `least`."""
    alive = state.alive + tuple(name for name in names if name not in state.alive)
    came = state.came if host in state.came else (*state.came, host)
    if not state.came:
        state = replace(state, hosts=hosts, least=least)
    return settled(replace(state, alive=alive, came=came))


def asks(state: Agreement, name: str) -> Agreement:
    """A rank without state asks to be in the next generation; ignored from a member of the present one.

    That ends the present generation, once all ranks of its host that start have asked: they join together.
    """
    if name not in state.alive or (name in state.members and name not in state.away):
        return state
    away = tuple(other for other in state.away if other != name)
    ready = {name: None, **state.ready}
    starting = [
        other
        for other in state.alive
        if host_of(other) == host_of(name) and other not in (*ready, *state.members, *away, *state.finished)
    ]
    ended = state.ended or (None if starting else f"{name} joins")
    return settled(replace(state, ready=ready, away=away, ended=ended))


def left(state: Agreement, name: str, number: int, step: int | None, reason: str) -> Agreement:
    """A member has left generation `number` with `step` committed; ignored if that is not the present one.

    `step` is None for one that has not taken the state of the run yet.
    """
    if number != state.number or name not in state.members or name not in state.alive or name in state.finished:
        return state
    away = tuple(other for other in state.away if other != name)
    return settled(replace(state, ready={**state.ready, name: step}, away=away, ended=state.ended or reason))


def died(state: Agreement, name: str, reason: str, instead: str | None = None) -> Agreement:
    """The agent of a rank has seen its process end; it starts the rank `instead` in its place.

    Both at once: in the beginning nobody goes on without the new one.
    """
    if name not in state.alive:
        return state
    alive = tuple(other for other in state.alive if other != name) + ((instead,) if instead is not None else ())
    ready = {other: step for other, step in state.ready.items() if other != name}
    away = tuple(other for other in state.away if other != name)
    ends = name in state.members and name not in state.finished
    ended = state.ended or reason if ends else state.ended
    return settled(replace(state, alive=alive, ready=ready, away=away, ended=ended))


def silent(state: Agreement, names: Iterable[str], reason: str) -> Agreement:
    """Nothing was heard of members for too long: the next generation does not wait for them."""
    quiet = [name for name in names if name in state.alive and name not in (*state.finished, *state.away)]
    if not quiet:
        return state
    ready = {name: step for name, step in state.ready.items() if name not in quiet}
    ended = state.ended or reason if any(name in state.members for name in quiet) else state.ended
    return settled(replace(state, away=(*state.away, *quiet), ready=ready, ended=ended))


def overdue(state: Agreement, number: int, reason: str) -> Agreement:
    """The others have waited too long for those that have not left generation `number`: they go on without them.

    In the beginning the whole run waits for all, and is restarted without them.
    """
    if number != state.number:
        return state
    if number == 0:
        return refused(state, reason)
    if state.ended is None and state.ready:  # one that joins waits for others of its host
        return settled(replace(state, ended=reason))
    return silent(state, state.missing, reason)


def departed(state: Agreement, host: str) -> Agreement:
    """The agent of a host has ended: its ranks have, and nobody waits for signs of it."""
    return replace(state, came=tuple(other for other in state.came if other != host))


def finished(state: Agreement, name: str) -> Agreement:
    """A member has done all its work; that its process ends is not a death."""
    if name in state.finished or name not in state.alive:
        return state
    ready = {other: step for other, step in state.ready.items() if other != name}
    return settled(replace(state, finished=(*state.finished, name), ready=ready))


def refused(state: Agreement, reason: str) -> Agreement:
    """A member cannot go on in place: the whole run starts again from its checkpoint, unless it is done."""
    return state if state.restart is not None or state.finished else replace(state, restart=reason)


def settled(state: Agreement) -> Agreement:
    """Commit the next generation if everybody it waits for is there; restart if it could not hold the run's state."""
    if state.ended is None or state.restart is not None or state.missing:
        return state
    if state.number == 0 and len(state.came) < state.hosts:
        return state
    if (restart := _obstacle(state)) is not None and not state.finished:  # a run that is done is not restarted
        return replace(state, restart=f"{restart}: {state.ended}")
    if restart is not None or not state.ready:
        return state
    members = _in_order(state)
    return replace(
        state,
        number=state.number + 1,
        members=members,
        steps=tuple(state.ready[name] for name in members),
        reason=state.ended,
        ended=None,
        ready={},
    )


def _obstacle(state: Agreement) -> str | None:
    """Return why those that are ready could not go on with the run; None if they can."""
    steps = [step for step in state.ready.values() if step is not None]
    if not steps and state.number:  # in the beginning all take a checkpoint, or begin anew
        return "no rank is left that holds the state of the run"
    if steps and max(steps) - min(steps) > 1:
        return f"the ranks are at steps {min(steps)} to {max(steps)}"
    hosts = len({host_of(name) for name in state.ready})
    if hosts < state.least and state.ready and not state.finished:
        return f"expected at least {state.least} hosts, got {hosts}"
    return None


def _in_order(state: Agreement) -> tuple[str, ...]:
    """Return the next members: host by host, the first rank a survivor, and survivors of a host in their old order."""
    survivors = [name for name in state.members if state.ready.get(name) is not None]
    # Those that join: in the order in which their agents have started them.
    names = survivors + [name for name in state.alive if name in state.ready and name not in survivors]
    hosts = list(dict.fromkeys(host_of(name) for name in names))
    return tuple(sorted(names, key=lambda name: hosts.index(host_of(name))))
