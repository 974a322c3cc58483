"""Recovery in place under every kind of trouble, in one process with a simulated clock: one seed is one schedule.

The agreement (membership.py) and its steps (procedures.py) are the real ones; `Sabotage` may replace functions of them.
Simulated are: the store and the links to it, which lose requests and answers and are slow or cut; ranks and agents,
which die, are stopped and go on, and are started again; the group of a generation, whose collectives end at each
member at another time or break; and the clock.

A rank's weights are a number made of every step that was applied to them, so weights that saw a step twice, or did not
see one, differ from the reference. After some time the troubles end, and then the run has to.
"""

import heapq
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from disttrain.errors import DisttrainError, LeftOutError, RunIsOverError, TooFewLeftError
from disttrain.launching import membership, procedures
from disttrain.launching.membership import Agreement, Generation, decode
from disttrain.launching.procedures import Announce, Beat, Beats, Now, Procedure, Read, Swap, Wait, Watch

SILENCE_S, PATIENCE_S, COLLECTIVE_S = 4.0, 20.0, 8.0
STEPS, STEP_S = 60, 0.3
CHECKPOINT_EVERY = 10
REQUEST_S, TRIES = 1.0, 4
LEASE_S = 3.0
"""An agent that reaches no store for so long ends, with its ranks."""
QUIET_AFTER_S = 25.0
ENDS_WITHIN_S = 400.0
SHORT_WAIT_S = 12.0
"""The longest wait of a survivor when nothing happens but deaths: for the longest step of the others."""


class Violation(AssertionError):
    """Something happened that must never happen."""


class Sleep(NamedTuple):
    """A process does something alone."""

    seconds: float


class Meet(NamedTuple):
    """A member takes part in a collective of its generation: `gives` goes to all; the answer is what each gave."""

    generation: Generation
    operation: str
    gives: Any


class Broken(Exception):
    """A collective that did not come to its end at this member."""


class Lost(Exception):
    """The store did not answer."""


def bits(step: int, before: int) -> int:
    """Return the weights after `step`, from those before it."""
    return hash((before, step, "weights"))


@dataclass
class Process:
    """A rank or an agent: its coroutine, and the host on which it runs."""

    name: str
    host: "Host"
    body: Generator[Any, Any, None]
    alive: bool = True
    stopped_until: float = 0.0
    hangs: bool = False  # its agent cannot see that it is stopped
    turn: int = 0  # answers to questions of the past are dropped
    step: int = 0
    weights: int = 0
    holds: bool = False
    generation: Generation | None = None
    heard: dict[int, str] = field(default_factory=dict)
    code: int | None = None
    waits_since: float | None = None


@dataclass
class Host:
    """A host: whether it is there and reaches the others, its agent and its ranks."""

    name: str
    alive: bool = True
    cut_until: float = 0.0
    agent: Process | None = None
    ranks: dict[int, Process] = field(default_factory=dict)
    incarnations: int = 0


@dataclass
class Group:
    """The connections of one generation's members."""

    generation: Generation
    epoch: int
    gave: dict[str, dict[str, Any]] = field(default_factory=dict)
    waits: dict[str, dict[str, tuple[Process, int]]] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Troubles:
    """How often what happens, in times a second of the simulation, and how lossy the links are."""

    kills: float = 0.1
    stops: float = 0.04
    agent_stops: float = 0.01
    host_losses: float = 0.02
    cuts: float = 0.03
    loses: float = 0.03
    slow: float = 0.05
    restarts: int = 60


CALM = (0.0,) * 7


class Simulation:
    """One schedule. `run` returns what happened, or raises a Violation."""

    def __init__(
        self, seed: int, *, hosts: int | None = None, ranks: int | None = None, troubles: Troubles | None = None
    ):
        self.random = random.Random(seed)
        self.now = 0.0
        self.queue: list[tuple[float, int, Callable[[], None]]] = []
        self.number = 0
        self.num_hosts = hosts or self.random.choice([1, 1, 2, 3])
        self.num_ranks = ranks or self.random.choice([1, 2, 3] if self.num_hosts == 1 else [1, 2])
        self.troubles = troubles or Troubles(
            kills=self.random.choice([0.0, 0.1, 0.3, 1.0]),
            stops=self.random.choice([0.0, 0.05, 0.2]),
            agent_stops=self.random.choice([0.0, 0.03]),
            host_losses=self.random.choice([0.0, 0.03, 0.1]),
            cuts=self.random.choice([0.0, 0.05, 0.2]),
            loses=self.random.choice([0.0, 0.02, 0.1, 0.3]),
            slow=self.random.choice([0.0, 0.1]),
        )
        self.steps = self.random.choice([5, 20, STEPS])
        self.spread = self.random.choice([0.01, 0.3])
        self.least = self.random.choice([1, 1, self.num_hosts])
        self.texts: dict[int, str] = {}
        self.signs: dict[str, str] = {}
        self.hosts: list[Host] = []
        self.groups: dict[tuple[int, int], Group] = {}
        self.epoch = 0
        self.meeting: list[Process] = []
        self.expected: dict[int, int] = {}
        self.began: dict[tuple[int, int], Generation] = {}
        self.commits: dict[tuple[int, int], dict[int, int]] = {}
        self.reference = [0]
        for step in range(STEPS):
            self.reference.append(bits(step, self.reference[-1]))
        self.checkpoint = 0
        self.furthest = 0
        self.over = False
        self.counts = {
            "generations": 0,
            "restarts": 0,
            "kills": 0,
            "stops": 0,
            "cuts": 0,
            "losses": 0,
            "redone": 0,
            "behind": 0,
        }

    # The clock.

    def after(self, seconds: float, then: Callable[[], None]) -> None:
        self.number += 1
        heapq.heappush(self.queue, (self.now + seconds, self.number, then))

    def run(self) -> dict[str, int]:
        for place in range(self.num_hosts):
            self.start_host(f"host{place}")
        self.after(self.random.expovariate(1.0), self.trouble)
        while self.queue:
            self.now, _, then = heapq.heappop(self.queue)
            then()
            if self.over and not any(process.alive for process in self.processes()):
                return self.counts
            if self.now > QUIET_AFTER_S + ENDS_WITHIN_S:
                waiting = [
                    (process.name, round(process.waits_since or 0.0, 1), process.step)
                    for process in self.processes()
                    if process.alive
                ]
                raise Violation(f"these wait for ever: {waiting}; {self.texts.get(self.epoch)}")
        raise Violation("nothing is left to happen, and the run has not ended")

    def processes(self) -> list[Process]:
        found = [rank for host in self.hosts for rank in host.ranks.values()]
        return found + [host.agent for host in self.hosts if host.agent is not None]

    # Processes: each is a coroutine that asks, and goes on when it is answered.

    def go_on(self, process: Process, answer: Any = None, error: BaseException | None = None) -> None:
        """Let a process go on with the answer to its question, later if it is stopped."""
        if not process.alive:
            return
        if process.stopped_until > self.now:
            turn = process.turn
            rest = process.stopped_until - self.now + 1e-6
            self.after(rest, lambda: turn == process.turn and self.go_on(process, answer, error))  # type: ignore[func-returns-value]
            return
        process.turn += 1
        try:
            question = process.body.send(answer) if error is None else process.body.throw(error)
        except StopIteration:
            process.alive = False
            return
        self.answer(process, question)

    def later(self, process: Process, seconds: float, answer: Callable[[], Any]) -> None:
        """Answer the present question of a process after some seconds."""
        turn = process.turn

        def then() -> None:
            if process.alive and turn == process.turn:
                try:
                    value = answer()
                except (Lost, Broken) as error:
                    self.go_on(process, error=error)
                else:
                    self.go_on(process, value)

        self.after(seconds, then)

    def answer(self, process: Process, question: Any) -> None:
        match question:
            case Now():
                self.later(process, 0.0, lambda: self.now)
            case Sleep(seconds):
                self.later(process, seconds, lambda: None)
            case Meet():
                self.meet(process, question)
            case _:
                self.ask_store(process, question, TRIES)

    # The store, and the links to it.

    def ask_store(self, process: Process, question: Any, tries: int) -> None:
        """Answer a question to the store; ask again when it or the answer got lost, as the real side does."""
        slow = self.random.random() < self.troubles.slow
        there, back = (self.random.expovariate(1 / (0.3 if slow else 0.002)) for _ in range(2))
        turn, epoch = process.turn, self.epoch_of(process)

        def lost() -> bool:
            return self.now < process.host.cut_until or (
                self.now < QUIET_AFTER_S and self.random.random() < self.troubles.loses
            )

        def again() -> None:
            if not process.alive or turn != process.turn:
                return
            if tries > 1:
                self.ask_store(process, question, tries - 1)
            else:
                self.go_on(process, error=Lost("the store does not answer"))

        def arrives() -> None:
            if not process.alive and self.random.random() < 0.5:
                return  # the request was under way when its process died, or was not
            if lost():
                self.after(REQUEST_S, again)
                return
            value = self.at_store(process, question, epoch)
            if isinstance(question, Wait) and value == question.text and question.at_most_s > 0:
                rest = min(0.2, question.at_most_s)
                waits = Wait(question.text, question.at_most_s - rest)
                self.after(
                    rest, lambda: process.alive and turn == process.turn and self.ask_store(process, waits, TRIES)
                )  # type: ignore[func-returns-value]
                return
            if lost():
                self.after(REQUEST_S, again)
            else:
                self.after(back, lambda: process.alive and turn == process.turn and self.go_on(process, value))  # type: ignore[func-returns-value]

        self.after(there, arrives)

    def epoch_of(self, process: Process) -> int:
        return int(process.name.partition("@")[2].partition("/")[0]) if "@" in process.name else self.epoch

    def at_store(self, process: Process, question: Any, epoch: int) -> Any:
        match question:
            case Read() | Wait():
                return self.texts.get(epoch, "")
            case Swap(expected, desired):
                if self.texts.get(epoch, "") == expected:
                    self.texts[epoch] = desired
                    self.check_committed(epoch, decode(expected), decode(desired))
                return self.texts.get(epoch, "")
            case Announce(number, reason):
                for other in self.processes():
                    if other.alive and self.epoch_of(other) == epoch:
                        self.after(
                            self.random.expovariate(1 / 0.02), lambda other=other: self.hear(other, number, reason)
                        )
            case Beat(host, sign):
                self.signs[host] = sign
            case Beats(hosts):
                return [self.signs.get(host, "") for host in hosts]
        return None

    def hear(self, process: Process, number: int, reason: str) -> None:
        """The listener of a rank hears that a generation is over; it wakes the rank where it waits for others."""
        process.heard[number] = reason
        if process.alive and process.generation is not None and process.generation.number == number:
            self.break_at(process, number)

    # Groups.

    def meet(self, process: Process, question: Meet) -> None:
        generation, name = question.generation, process.name
        group = self.groups.setdefault(
            (self.epoch_of(process), generation.number), Group(generation, self.epoch_of(process))
        )
        gave = group.gave.setdefault(question.operation, {})
        if question.operation.startswith("step") and gave and (*gave.values(),)[0] != question.gives:
            raise Violation(f"members of one generation do another step or have other weights: {gave}, {question}")
        gave[name] = question.gives
        waits = group.waits.setdefault(question.operation, {})
        waits[name] = (process, process.turn)
        turn = process.turn
        if generation.number in process.heard or group.left & {*generation.members}:
            self.after(0.01, lambda: self.break_off(process, turn))
        self.after(COLLECTIVE_S, lambda: self.break_off(process, turn))
        if len(gave) == len(generation.members):
            given = [gave[member] for member in generation.members]
            for other, its_turn in list(waits.values()):
                delay = self.random.expovariate(1 / self.spread)
                self.after(delay, lambda o=other, t=its_turn: self.complete(group, o, t, given))

    def complete(self, group: Group, process: Process, turn: int, given: list[Any]) -> None:
        if process.alive and process.turn == turn and self.now >= process.host.cut_until:
            self.go_on(process, given)

    def break_off(self, process: Process, turn: int) -> None:
        if process.alive and process.turn == turn:
            self.go_on(process, error=Broken("a peer is lost"))

    def break_at(self, process: Process, number: int) -> None:
        group = self.groups.get((self.epoch_of(process), number))
        for waits in group.waits.values() if group is not None else ():
            if process.name in waits:
                self.break_off(*waits[process.name])

    def leaves(self, process: Process, notice: bool = True) -> None:
        """A process has left its group or died: the others notice soon, unless its whole host is lost."""
        if process.generation is None:
            return
        group = self.groups.get((self.epoch_of(process), process.generation.number))
        if group is None:
            return
        group.left.add(process.name)
        for waits in group.waits.values():
            for other, turn in waits.values():
                if other is not process and (notice or self.random.random() < 0.5):
                    delay = self.random.expovariate(1 / 0.02) if notice else 3.0
                    self.after(delay, lambda o=other, t=turn: self.break_off(o, t))

    # Ranks.

    def rank(self, host: Host, name: str, start_s: float) -> Generator[Any, Any, None]:
        """A rank as run/ has it: join, take the state if it is behind, do steps; when it breaks, leave and go on."""
        process = yield Sleep(0.0)
        yield Sleep(start_s)
        process.step, process.weights = self.checkpoint, self.reference[self.checkpoint]
        try:
            generation: Generation = yield from self.timed(process, procedures.join(name, PATIENCE_S))
            while True:
                process.generation = generation
                self.check_entered(process, generation)
                try:
                    yield from self.train(process, generation)
                    break
                except Broken:
                    self.leaves(process)
                    step = process.step if process.holds else None
                    try:
                        generation = yield from self.timed(
                            process,
                            procedures.leave(name, generation.number, step, "broken", PATIENCE_S),
                        )
                    except RunIsOverError:
                        raise
                    except LeftOutError:
                        process.generation, process.holds = None, False
                        generation = yield from self.timed(process, procedures.join(name, PATIENCE_S))
            yield from self.timed(process, procedures.change(membership.finished, name))
            process.code = 0
        except RunIsOverError:
            process.code = 0
        except (DisttrainError, Lost):
            process.code = 1
        self.leaves(process)

    def train(self, process: Process, generation: Generation) -> Generator[Any, Any, None]:
        own = generation.members.index(process.name)
        if self.epoch_of(process) != self.epoch:
            raise DisttrainError("the run directory is in use")
        process.holds = process.holds or generation.source is None  # that of the checkpoint
        given = yield Meet(generation, "state", (process.step, process.weights))
        if generation.source is not None and own in generation.behind:
            process.step, process.weights = given[generation.source]
            if process.step < max(step for step in generation.steps if step is not None):
                raise Violation(f"{process.name} takes a state that is older than that of another member: {generation}")
        process.holds = True
        step = generation.step if generation.step is not None else process.step
        while step < self.steps:
            if generation.number in process.heard:
                raise Broken("it is over")
            yield Sleep(self.random.expovariate(1 / STEP_S))
            yield Meet(generation, f"step {step}", (step, process.weights))
            process.weights = bits(step, process.weights)  # no moment lies between an update and its count
            step = process.step = step + 1
            self.check_step(process, generation)
            if generation.members[0] == process.name and step % CHECKPOINT_EVERY == 0:
                self.checkpoint = max(self.checkpoint, step)
        yield Meet(generation, "end", None)

    def timed(self, process: Process, procedure: Procedure) -> Generator[Any, Any, Any]:
        """Run a procedure; no wait may be longer than what is configured, and a store that is lost ends it."""
        process.waits_since, lost = self.now, None
        try:
            result = yield from procedure
        except Lost as error:
            lost = TooFewLeftError(str(error))
        except DisttrainError as error:
            lost = error
        self.check_wait(process)
        process.waits_since = None
        if lost is not None:
            raise lost
        return result

    # Agents.

    def start_host(self, name: str) -> None:
        host = Host(f"{name}#{self.number}")
        self.hosts.append(host)
        host.agent = Process(f"agent of {host.name}", host, self.agent(host))
        self.go_on(host.agent)

    def agent(self, host: Host) -> Generator[Any, Any, None]:
        """An agent as recovering_agent.py has it: start ranks, tell who ended, replace, watch, meet to restart."""
        left, joins = self.troubles.restarts, False
        yield Sleep(self.random.uniform(0.0, 1.0))
        while True:
            joins = not joins and host.incarnations == 0 and self.epoch > 0 and self.is_running(self.epoch)
            if not joins:
                yield from self.rendezvous(host)
            if self.over:  # its ranks would find the run completed
                return
            epoch = self.epoch
            names = [self.start_rank(host, place, epoch) for place in range(self.num_ranks)]
            hosts = self.expected[epoch]
            try:
                yield from procedures.change(membership.started, f"{host.name}@{epoch}", names, hosts, self.least)
                for place, name in enumerate(names):
                    self.begin_rank(host, place, name)
                ended = yield from self.look_after(host, epoch, left)
            except Lost:
                ended = "lost"
            for rank in host.ranks.values():
                self.kill(rank)
            if ended == "done":
                self.over = True
                return
            if ended == "lost":
                self.lose(host, back=True)
                return
            left -= 1
            self.counts["restarts"] += 1

    def look_after(self, host: Host, epoch: int, left: int) -> Generator[Any, Any, str]:
        watch, looks, own = Watch(SILENCE_S), 0, f"{host.name}@{epoch}"
        while True:
            yield Sleep(0.25)
            looks += 1
            begins = []
            for place, rank in list(host.ranks.items()):
                if rank.alive:
                    continue
                del host.ranks[place]
                if rank.code == 0:
                    yield from procedures.change(membership.finished, rank.name)
                else:
                    left -= 1
                    name = self.start_rank(host, place, epoch) if left >= 0 else None
                    yield from procedures.change(membership.died, rank.name, f"{rank.name} died", name)
                    if name is not None:
                        begins.append((place, name))
            stopped = [rank.name for rank in host.ranks.values() if rank.stopped_until > self.now and not rank.hangs]
            state: Agreement = yield from procedures.watch_over(own, f"{looks}", watch, stopped)
            if state.restart is None and self.meeting:  # torch's agents restart for hosts that wait
                state = yield from procedures.change(membership.refused, "hosts wait")
            if state.restart is not None:
                return "restart"
            if state.finished:
                for _, name in begins:
                    yield from procedures.change(membership.died, name, "not begun")
                for rank in host.ranks.values():
                    if rank.name in state.away:
                        self.kill(rank)
                if not host.ranks:
                    yield from procedures.change(membership.departed, own)
                    return "done"
                continue
            for place, name in begins:
                self.begin_rank(host, place, name)
            if not host.ranks:
                return "lost"

    def is_running(self, epoch: int) -> bool:
        state = decode(self.texts.get(epoch, ""))
        return state.restart is None and not state.finished and bool(state.alive)

    def rendezvous(self, host: Host) -> Generator[Any, Any, None]:
        """torch's own meeting of agents: it forms a round of those that have come, a moment after the first."""
        assert host.agent is not None
        self.meeting.append(host.agent)
        if len([agent for agent in self.meeting if agent.alive]) == 1:
            self.after(2.0, self.form_round)
        epoch = self.epoch
        while self.epoch == epoch or host.agent in self.meeting:
            yield Sleep(0.2)
            if self.over:
                return

    def form_round(self) -> None:
        # The run directory's lock: a run begins when no rank of the one before it is left.
        self.meeting = [agent for agent in self.meeting if agent.alive]
        elsewhere = [host for host in self.hosts if host.agent not in self.meeting]
        reached = [
            host for host in elsewhere if host.agent and host.agent.alive and host.agent.stopped_until <= self.now
        ]
        if reached or any(rank.alive for host in self.hosts for rank in host.ranks.values()):
            self.after(1.0, self.form_round)
            return
        if self.meeting:
            self.epoch += 1
            self.expected[self.epoch] = len(self.meeting)
            self.meeting = []

    def start_rank(self, host: Host, place: int, epoch: int) -> str:
        host.incarnations += 1
        return f"{host.name}@{epoch}/{place}.{host.incarnations}"

    def begin_rank(self, host: Host, place: int, name: str) -> None:
        start_s = self.random.uniform(0.2, 1.0)
        process = Process(name, host, self.rank(host, name, start_s))
        host.ranks[place] = process
        process.body.send(None)
        process.turn += 1
        self.after(0.0, lambda: self.go_on(process, process))

    # Troubles.

    def kill(self, process: Process, notice: bool = True) -> None:
        if process.alive:
            self.check_wait(process)
            process.alive = False
            self.leaves(process, notice)

    def lose(self, host: Host, back: bool) -> None:
        """A whole host is lost; after some time another agent may come in its place."""
        for rank in host.ranks.values():
            self.kill(rank, notice=False)
        if host.agent is not None:
            host.agent.alive = False
        if host in self.hosts:
            self.hosts.remove(host)
        if back:
            self.after(
                self.random.uniform(1.0, 10.0),
                lambda: None if self.over else self.start_host(host.name.partition("#")[0]),
            )

    def trouble(self) -> None:
        if self.now >= QUIET_AFTER_S or self.over:
            return
        chances = {
            self.kill_one: self.troubles.kills,
            self.stop_one: self.troubles.stops,
            self.stop_agent: self.troubles.agent_stops,
            self.lose_one: self.troubles.host_losses,
            self.cut_one: self.troubles.cuts,
        }
        if total := sum(chances.values()):
            self.random.choices(list(chances), list(chances.values()))[0]()
            self.after(self.random.expovariate(total), self.trouble)

    def any_rank(self) -> Process | None:
        ranks = [rank for host in self.hosts for rank in host.ranks.values() if rank.alive]
        return self.random.choice(ranks) if ranks else None

    def kill_one(self) -> None:
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):  # several at once as well
            if (rank := self.any_rank()) is not None:
                self.counts["kills"] += 1
                self.kill(rank)

    def stop_one(self) -> None:
        if (rank := self.any_rank()) is not None:
            self.counts["stops"] += 1
            rank.hangs = self.random.random() < 0.3
            rank.stopped_until = self.now + self.random.choice([0.5, 3.0, 10.0, 30.0, 120.0 if rank.hangs else 1.0])

    def stop_agent(self) -> None:
        host = self.random.choice(self.hosts) if self.hosts else None
        if host is not None and host.agent is not None:
            self.counts["stops"] += 1
            host.agent.stopped_until = self.now + self.random.choice([0.5, 3.0, 10.0])

    def lose_one(self) -> None:
        if self.hosts:
            self.counts["losses"] += 1
            self.lose(self.random.choice(self.hosts), back=True)

    def cut_one(self) -> None:
        if self.hosts:
            self.counts["cuts"] += 1
            host = self.random.choice(self.hosts)
            host.cut_until = self.now + self.random.choice([0.5, 2.0, 8.0])
            for rank in host.ranks.values():
                if rank.generation is not None and self.random.random() < 0.7:
                    self.after(3.0, lambda rank=rank: rank.generation and self.break_at(rank, rank.generation.number))

    # What must hold.

    def check_committed(self, epoch: int, before: Agreement, after: Agreement) -> None:
        if after.restart is not None and before.restart is None and after.finished:
            raise Violation(f"a run that is done is restarted: {after}")
        if after.number == before.number:
            return
        excused = {*after.away, *after.finished, *after.members}
        if forgotten := [name for name in before.members if name in after.alive and name not in excused]:
            raise Violation(f"generation {after.number} is without {forgotten}, who live and were not waited for")
        if not after.finished and len({*map(membership.host_of, after.members)}) < self.least:
            raise Violation(f"generation {after.number} is on fewer than {self.least} hosts: {after.members}")
        if after.number == 1 and len(after.came) < self.expected[epoch]:
            raise Violation(f"the first generation begins before all hosts have come: {after}")
        if after.number != before.number + 1 or (epoch, after.number) in self.began:
            raise Violation(f"generation {after.number} is committed twice, or one is missing")
        self.began[epoch, after.number] = after.generation
        self.counts["generations"] += 1
        if before.number:
            steps = [step for step in after.steps if step is not None]
            if not steps:
                raise Violation(f"nobody in generation {after.number} holds the state of the run: {after}")
            done = max(
                (max(steps_done) for (its, _), steps_done in self.commits.items() if its == epoch and steps_done),
                default=0,
            )
            if max(steps) < done - 1:
                raise Violation(f"generation {after.number} begins at step {max(steps)}, and step {done} was done")
            self.counts["redone"] += max(steps) < done
            self.counts["behind"] += min(steps) < max(steps)

    def check_wait(self, process: Process) -> None:
        """No wait is longer than what is configured, and a short one where nothing but deaths happened."""
        began = process.waits_since
        if began is None or process.stopped_until > began:
            return
        deaths_alone = self.troubles == Troubles(self.troubles.kills, *CALM[1:])
        short = SHORT_WAIT_S if process.holds else PATIENCE_S - 1.0
        longest = short if deaths_alone else PATIENCE_S + SILENCE_S + 6 * TRIES * REQUEST_S
        if self.now - began > longest:
            raise Violation(f"{process.name} waited for {self.now - began:.0f} s")

    def check_entered(self, process: Process, generation: Generation) -> None:
        committed = self.began.get((self.epoch_of(process), generation.number))
        if committed != generation:
            raise Violation(f"{process.name} is in {generation}, and {committed} was committed")

    def check_step(self, process: Process, generation: Generation) -> None:
        epoch, step = self.epoch_of(process), process.step
        if process.weights != self.reference[step]:
            raise Violation(f"{process.name} has other weights after step {step}: one was done twice, or left out")
        if epoch != self.epoch:
            raise Violation(f"{process.name} of launch {epoch} does step {step} beside launch {self.epoch}")
        following = self.began.get((epoch, generation.number + 1))
        if following is not None and following.step is not None and step > following.step + 1:
            raise Violation(f"{process.name} does step {step} in generation {generation.number}, beside {following}")
        done = self.commits.setdefault((epoch, generation.number), {})
        done[step] = done.get(step, 0) + 1
        if done[step] > len(generation.members):
            raise Violation(f"step {step} was done {done[step]} times in generation {generation.number}")


def simulate(seed: int, **settings: Any) -> dict[str, int]:
    """Run the schedule of a seed; return how often what happened. A Violation names the seed."""
    try:
        return Simulation(seed, **settings).run()
    except Violation as violation:
        raise Violation(f"seed {seed}: {violation}") from violation
