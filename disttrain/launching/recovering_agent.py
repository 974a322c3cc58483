"""torch's elastic agent for runs that recover in place: when a rank ends, the other ranks of its host keep running.

*Contract*: the agent tells the store which ranks it has started and which of them have ended (membership.py), and
starts a new rank in the place of one that died, as often as `--max-restarts` allows restarts. A rank that ends with 0
has finished. When the run cannot go on in place, all ranks of all agents are restarted as torch's agent does it, which
uses up one of the restarts too. Signals, exit codes and the rendezvous of hosts are torch's.

*How*: torch's agent asks its subclasses for four methods: to start workers, to stop them, to end, and to say how they
are. Here each rank is a context of processes of its own, since torch's stops all processes of a context when one fails.

*Source*: torch.distributed.elastic.agent.server.api (`SimpleElasticAgent`), multiprocessing.start_processes.
"""

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerState
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from disttrain.errors import TooFewLeftError
from disttrain.launching.elastic import PoliteAgent
from disttrain.launching.generations import AgreementStore
from disttrain.launching.membership import Agreement, departed, died, finished, refused, started
from disttrain.launching.procedures import Watch, announce, change, end_of, watch_over
from disttrain.launching.process_watch import Lease, end_at_once, stopped, wait_for_an_end
from disttrain.launching.recovery_variables import Recovery, torchruns_variables
from disttrain.launching.running_launch import agreement_of, join_running

_LONGEST_WAIT_S = 0.2
_LINGER_S = 0.5


class RecoveringAgent(PoliteAgent):
    """See above. `exit_codes` is the folder in which ranks report their exit codes."""

    def __init__(self, silence_s: float, exit_codes: Path, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._silence_s = silence_s
        self._exit_codes = exit_codes
        self._host = f"{socket.gethostname()}:{os.getpid()}"
        self._incarnations = 0
        self._contexts: dict[int, PContext] = {}
        self._names: dict[int, str] = {}
        self._failures: dict[int, ProcessFailure] = {}
        self._number = self._looks = 0
        self._where: Recovery | None = None
        self._store_of_all: AgreementStore | None = None
        self._watch = Watch(silence_s)
        self._lease = Lease(silence_s, end_at_once)

    @property
    def _place(self) -> AgreementStore:
        assert self._store_of_all is not None
        return self._store_of_all

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """Meet the other agents as torch's agent does; or, at this agent's start, join ranks that run already."""
        handler: Any = worker_group.spec.rdzv_handler
        self._where = None if self._incarnations else join_running(handler, self._silence_s)
        if self._where is None:
            super()._rendezvous(worker_group)
            assert worker_group.store is not None
            self._where = agreement_of(handler, worker_group.store, worker_group.group_rank == 0, self._silence_s)
            return
        count = worker_group.spec.local_world_size
        group: Any = worker_group
        group.workers = [Worker(rank, rank, rank, count, count) for rank in range(count)]
        group.store = self._store = handler.store
        group.group_rank, group.group_world_size = 0, 1
        group.master_addr, group.master_port = self._where.host, self._where.port

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Start all ranks of this host; return their process ids by local rank."""
        spec = worker_group.spec
        assert self._where is not None
        self._store_of_all = AgreementStore(self._where)
        self._contexts, self._failures, self._number = {}, {}, 0
        self._names = {local_rank: self._new_name(local_rank) for local_rank in range(spec.local_world_size)}
        handler: Any = spec.rdzv_handler
        hosts, least = worker_group.group_world_size or 1, handler.least
        self._place.run(change(started, self._host, list(self._names.values()), hosts, least))
        for local_rank in self._names:
            self._start_rank(worker_group, local_rank)
        return {local_rank: context.pids()[0] for local_rank, context in self._contexts.items()}

    def _new_name(self, local_rank: int) -> str:
        self._incarnations += 1
        return f"{self._host}/{local_rank}.{self._incarnations}"

    def _start_rank(self, worker_group: WorkerGroup, local_rank: int) -> None:
        spec = worker_group.spec
        assert self._where is not None
        assert spec.entrypoint is not None
        where = replace(self._where, member=self._names[local_rank])
        restarts = int(spec.max_restarts - self._remaining_restarts)
        self._contexts[local_rank] = start_processes(
            name=spec.role,
            entrypoint=spec.entrypoint,
            args={0: spec.args},
            envs={0: {**torchruns_variables(worker_group, local_rank, restarts), **where.variables()}},
            logs_specs=DefaultLogsSpecs(os.devnull),
            start_method=self._start_method,
        )
        worker_group.workers[local_rank].id = self._contexts[local_rank].pids()[0]

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Wait a moment for the end of a rank; tell the store, and start another in its place."""
        wait_for_an_end(list(self._pids()), _LONGEST_WAIT_S)
        try:
            replaced = self._tell_ends(replace_dead=True)
            state = self._look(self._place)
            for local_rank in replaced:
                if state.restart is None and not state.finished:
                    self._start_rank(worker_group, local_rank)
                else:
                    self._place.run(change(died, self._names[local_rank], "it was not started any more"))
        except TooFewLeftError as error:
            print(error, file=sys.stderr)
            return self._failed()
        if state.restart is not None:
            print(f"all ranks start again from the newest checkpoint: {state.restart}", file=sys.stderr)
            return self._failed()
        if state.finished:  # nobody waits for a rank that is stopped
            self._kill(pid for pid, name in self._pids().items() if name in state.away)
        if self._contexts:
            return RunResult(state=WorkerState.HEALTHY)
        if state.finished:
            return RunResult(WorkerState.SUCCEEDED, {worker.global_rank: None for worker in worker_group.workers})
        return self._failed()

    def _look(self, place: AgreementStore) -> Agreement:
        """Give a sign of life, leave out who gives none, and announce again what has ended; return the state."""
        self._looks += 1
        pids = self._pids()
        names = [pids[pid] for pid in stopped(pids)]
        state: Agreement = place.run(watch_over(self._host, str(self._looks), self._watch, names))
        if len(state.came) > 1:
            self._lease.renew()
        else:
            self._lease.suspend()
        while (reason := end_of(state, self._number)) is not None:  # who announced it may have died before it did
            place.run(announce(self._number, reason))
            if self._number == state.number:
                break
            self._number += 1
        return state

    def _tell_ends(self, replace_dead: bool) -> list[int]:
        """Tell the store which ranks have ended; return the local ranks in which another is to be started."""
        replaced = []
        for local_rank, context in list(self._contexts.items()):
            if (result := context.wait(0)) is None:
                continue
            del self._contexts[local_rank]
            name, failure = self._names[local_rank], result.failures.get(0)
            if failure is None:
                self._place.run(change(finished, name))
                continue
            how = f"ended with code {failure.exitcode}"
            if failure.exitcode < 0:  # a killed rank could not print anything
                how = f"was ended by {signal.Signals(-failure.exitcode).name}"
                print(f"the rank with local rank {local_rank} {how}", file=sys.stderr)
            self._failures[local_rank] = failure
            state = self._place.state()  # a rank that ends because all restart uses up no restart of its own
            goes_on = replace_dead and state.restart is None and not state.finished
            instead = self._instead_of(local_rank) if goes_on else None
            self._place.run(change(died, name, f"{name} {how}", instead))
            replaced += [local_rank] * (instead is not None)
        return replaced

    def _instead_of(self, local_rank: int) -> str | None:
        """Return the name of a new rank in the place of one that died, while restarts are left."""
        report = self._exit_codes / str(local_rank)
        if self._remaining_restarts <= 0:
            print(f"local rank {local_rank} is not started again: --max-restarts are used up", file=sys.stderr)
            if self._contexts:  # the run's exit code is that of the ranks that go on
                report.unlink(missing_ok=True)
            return None
        self._remaining_restarts -= 1
        report.unlink(missing_ok=True)
        self._names[local_rank] = self._new_name(local_rank)
        return self._names[local_rank]

    def _failed(self) -> RunResult:
        """Return a result upon which torch's agent restarts all ranks, or ends if no restarts are left."""
        workers = self._worker_group.workers
        failures = {workers[local_rank].global_rank: failure for local_rank, failure in self._failures.items()}
        if not failures:
            failures = {workers[0].global_rank: ProcessFailure(0, workers[0].id or 0, 1, os.devnull)}
        return RunResult(WorkerState.FAILED, failures=failures)

    def _stop_workers(self, worker_group: WorkerGroup, *more: Any, **others: Any) -> None:
        """Stop all ranks of this host for a restart of all, which the other hosts have to know of."""
        with suppress(TooFewLeftError):
            self._place.run(change(refused, "the hosts meet anew"))
        super()._stop_workers(worker_group, *more, **others)  # versions of torch give it different arguments

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30, **_: Any) -> None:
        """Signal all ranks of this host, and kill those that do not end within `timeout` seconds.

        Meanwhile they may still recover: a rank that leaves its generation waits for the next one, to save in it.
        """
        self._lease.suspend()
        deadline = time.monotonic() + timeout
        self._kill(stopped(self._pids()))
        for pid in self._pids():
            with suppress(ProcessLookupError):
                os.kill(pid, death_sig)
        while self._contexts and (rest_s := deadline - time.monotonic()) > 0:
            wait_for_an_end(list(self._pids()), min(rest_s, _LONGEST_WAIT_S))
            with suppress(TooFewLeftError):
                self._tell_ends(replace_dead=False)
        for context in self._contexts.values():
            context.close(signal.SIGKILL)
        self._contexts = {}
        super()._shutdown(death_sig)  # it has no context of its own, but other things that end

    def _exit_barrier(self) -> None:
        """Wait until the ranks of the other hosts have ended: one of the agents has the store in its process."""
        self._lease.suspend()
        deadline = time.monotonic() + self._exit_barrier_timeout
        with suppress(TooFewLeftError):  # the agent that has the store has ended
            state: Agreement = self._place.run(change(departed, self._host))
            others, watch = bool(state.came), Watch(self._silence_s)
            while state.came and time.monotonic() < deadline:
                time.sleep(_LONGEST_WAIT_S)
                state = self._place.run(watch_over(self._host, "ended", watch, []))
                if all(name in state.away for name in state.alive if name not in state.finished):
                    break
            time.sleep(_LINGER_S * others)  # the others read that they are the last

    def _pids(self) -> dict[int, str]:
        """Return the names of the ranks that run, by process id."""
        return {context.pids()[0]: self._names[local_rank] for local_rank, context in self._contexts.items()}

    @staticmethod
    def _kill(pids: Any) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
