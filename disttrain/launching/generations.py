"""A rank's side of recovery in place: which generation it belongs to, when that has ended, and which one comes next.

*Contract*: `Member` is one rank of a launch that recovers in place. It waits for
generations, at most `patience_s` each. One sleeping thread with a connection of its own hears when the present
generation has ended. The store is that of the agent, which outlives the ranks.

*Use*: `first`, once the rank has built what it can build alone; connect a group at `store(generation)` with the numbers
of `topology(generation)`; let `behind` take the state of `source` and compare; train. When the group breaks, or
`ended(generation)` says so, close the group, `leave`, and begin again with the generation that it returns. `finish`.

*Errors*: LeftOutError, RunIsOverError and TooFewLeftError. The last one also for a store that does not answer: without
it nobody can say who goes on.

*Cost*: a generation's end and the next one's beginning: some requests to the store for each member, a few milliseconds
on one host. While a generation goes on: nothing.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from disttrain.environment import Topology, read_launch
from disttrain.errors import TooFewLeftError
from disttrain.launching.membership import Agreement, Generation, decode, finished, host_of, refused
from disttrain.launching.procedures import (
    Announce,
    Beat,
    Beats,
    Now,
    Procedure,
    Read,
    Swap,
    Wait,
    announce,
    change,
    join,
    leave,
)
from disttrain.launching.recovery_variables import Recovery, read_recovery

if TYPE_CHECKING:
    from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
else:
    from torch.distributed import PrefixStore, Store, TCPStore

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""How long a member waits by default for the others that live, and are busy; silent ones are left out much earlier."""
_STATE = "state"
_CONNECTS_WITHIN_S = 60.0
_LONGEST_REST_S = 0.02


class AgreementStore:
    """The state in the store of an agent: answers what procedures ask, over a connection of its own."""

    def __init__(self, where: Recovery) -> None:
        self._where = where
        self._store = self._connect()

    def _connect(self) -> Store:
        where = self._where
        # First by a plain socket: torch's store is patient with a name server that is slow, and so with a dead agent.
        socket.create_connection((where.host, where.port), timeout=where.silence_s).close()
        timeout = timedelta(seconds=_CONNECTS_WITHIN_S)
        store = TCPStore(where.host, where.port, is_master=False, wait_for_workers=False, timeout=timeout)
        return PrefixStore(where.prefix, store)

    @property
    def store(self) -> Store:
        return self._store

    def run(self, procedure: Procedure) -> Any:
        """Answer what the procedure asks until it returns; return what it returned.

        *Errors*: those of the procedure; TooFewLeftError if the store does not answer.
        """
        answer: Any = None
        while True:
            try:
                question = procedure.send(answer)
            except StopIteration as done:
                return done.value
            try:
                answer = self._answer(question)
            except RuntimeError as lost:  # torch's own, for a connection that is lost; another one may still be made
                logger.warning("the store of the generations did not answer, trying once more: %s", lost)
                try:
                    self._store = self._connect()
                    answer = self._answer(question)
                except (OSError, RuntimeError) as error:
                    raise TooFewLeftError(
                        f"expected the store at {self._where.host}:{self._where.port}, which says which ranks go on, "
                        f"got no answer ({error}); the launcher of that host has ended, or the host is lost"
                    ) from error

    def state(self) -> Agreement:
        """Return the present state."""
        return decode(str(self.run(_read())))

    def _answer(self, question: object) -> Any:
        match question:
            case Read():
                return self._read()
            case Swap(expected, desired):
                return self._store.compare_set(_STATE, expected, desired).decode()
            case Announce(number, reason):
                self._store.set(f"ended/{number}", reason)
            case Now():
                return time.monotonic()
            case Beat(host, sign):
                self._store.set(f"beat/{host}", sign)
            case Beats(hosts):
                return [self._get(f"beat/{host}") for host in hosts]
            case Wait(text, at_most_s):
                return self._changed(text, at_most_s)
        return None

    def _read(self) -> str:
        return self._get(_STATE)

    def _get(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _changed(self, text: str, at_most_s: float) -> str:
        # Not `Store.wait`: no signal is handled during it, and an agent's signal ends ranks that wait.
        deadline, rest_s = time.monotonic() + at_most_s, 0.001
        while (now := self._read()) == text and time.monotonic() < deadline:
            time.sleep(rest_s)
            rest_s = min(_LONGEST_REST_S, rest_s * 1.5)
        return now


class Member:
    """This process as a member of a run that recovers in place; `name` is "HOST/LOCAL_RANK.INCARNATION"."""

    def __init__(self, where: Recovery) -> None:
        self.name = where.member
        self._place = AgreementStore(where)
        # Connected now, so that a recovery waits for no name server.
        self._meets, self._hears = AgreementStore(where).store, AgreementStore(where).store
        self._present = 0
        self._known: dict[int, str] = {}
        self.when_ended: Callable[[int, str], object] | None = None
        """Called with (number, reason) when the present generation has ended, by the thread that listens.

        It breaks the connections of the group in which this rank may wait for one that is stopped or cut off. It may
        come while the main thread leaves that generation, but not once it is in the next one.
        """
        self._enters = threading.Lock()
        self._changed = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="disttrain-generations", daemon=True)
        self._listener.start()

    @classmethod
    def of_this_process(cls) -> "Member | None":
        """Return the member that this process is; None where its launcher offers no recovery in place."""
        where = read_recovery()
        return None if where is None else cls(where)

    def first(self, patience_s: float = PATIENCE_S) -> Generation:
        """Ask to be in the run, and wait for the first generation that holds this member.

        In the beginning all ranks wait for each other here. Later this ends the present generation: everybody leaves
        it, and all meet in the next. So a rank that joins calls this once it has built what it can build alone. A
        member that was left out may call it again.
        """
        return self._entered(self._place.run(join(self.name, patience_s)))

    def leave(
        self, generation: Generation, reason: str, step: int | None, patience_s: float = PATIENCE_S
    ) -> Generation:
        """Say that this member has left `generation` with `step` committed; wait for the next one, and return it.

        `step` is None for a member that joined and has not taken the whole state yet: it has nothing to give.
        Call it after the group of `generation` is closed: from now on nothing of it may go on in this process.

        *Errors*: LeftOutError if the others went on without this member: it may call `first`, or end. TooFewLeftError
        if the run cannot go on in place: the process ends, and the launcher restarts all ranks.
        """
        following = self._place.run(leave(self.name, generation.number, step, reason, patience_s))
        if generation.number not in self._known:  # this process's listener waits for it
            self._place.run(announce(generation.number, following.reason))
        return self._entered(following)

    def ended(self, generation: Generation) -> str | None:
        """Return why `generation` is over, as far as this process has heard; None so far. Cheap: every step may ask."""
        return self._known.get(generation.number)

    def finish(self) -> None:
        """Say that this member has done all its work: its end is no death, and nobody waits for it.

        Call it when nothing is left that needs the other members, also not of them: after the last step, the last
        evaluation and the last save of all.
        """
        self._place.run(change(finished, self.name))

    def refuse(self, reason: str) -> None:
        """Say that this run cannot go on in place, for `reason`: all get TooFewLeftError, and all ranks restart."""
        self._place.run(change(refused, reason))

    def store(self, generation: Generation) -> Store:
        """Return a store in which the members of `generation` can meet: the agent's, under a prefix of its own."""
        return PrefixStore(f"generation/{generation.number}", self._meets)

    def topology(self, generation: Generation) -> Topology:
        """Return the place of this member in a generation that holds it. Its local rank, its device's, stays."""
        launch = read_launch()
        before = Topology() if launch is None else launch.topology
        hosts = list(dict.fromkeys(host_of(name) for name in generation.members))
        return Topology(
            rank=generation.members.index(self.name),
            world_size=len(generation.members),
            local_rank=before.local_rank,
            local_world_size=before.local_world_size,
            node_rank=hosts.index(host_of(self.name)),
            num_nodes=len(hosts),
        )

    def _entered(self, generation: Generation) -> Generation:
        with self._enters:
            self._present = generation.number
        self._changed.set()
        return generation

    def _listen(self) -> None:
        """Wait for the end of the present generation; the thread sleeps until it is announced."""
        heard = 0
        while True:
            self._changed.wait()
            self._changed.clear()
            while (number := self._present) > heard:
                try:
                    self._known[number] = _wait_for_days(self._hears, f"ended/{number}")
                except RuntimeError as lost:
                    logger.warning("the store of the generations has ended: %s", lost)
                    self._known[number] = "the launcher's store does not answer"
                    return
                heard = number
                with self._enters:
                    if self.when_ended is not None and self._present == number:
                        self.when_ended(number, self._known[number])


def _wait_for_days(store: Store, key: str) -> str:
    """Wait until `key` is set, and return its value. A shorter wait of torch's store would end with a warning."""
    while not store.check([key]):
        try:
            store.wait([key], timedelta(days=7))
        except RuntimeError as error:
            logger.debug("waiting for %s ended: %s", key, error)
    return store.get(key).decode()


def _read() -> Procedure:
    return (yield Read())
