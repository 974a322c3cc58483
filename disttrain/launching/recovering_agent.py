"""torch's elastic agent for runs that recover in place: when a rank ends, the other ranks of its host keep running.

*Contract*: the agent tells the store which ranks it has started and which of them have ended (membership.py), and
starts a new rank in the place of one that died, as often as `--max-restarts` allows restarts. A rank that ends with 0
has finished. When the run cannot go on in place, all ranks of all agents are restarted as torch's agent does it, which
uses up one of the restarts too. Signals, exit codes and the rendezvous of hosts are torch's.

*How*: torch's agent asks its subclasses for four methods: to start workers, to stop them, to end, and to say how they
are. Here each rank is a context of processes of its own, since torch's stops all processes of a context when one fails.

*Source*: torch.distributed.elastic.agent.server.api (`SimpleElasticAgent`), multiprocessing.start_processes.
"""

import logging
import os
import select
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.launcher import api as launcher

from disttrain.errors import TooFewLeftError
from disttrain.launching.generations import AgreementStore
from disttrain.launching.membership import died, finished, started
from disttrain.launching.procedures import announce, change, end_of
from disttrain.launching.recovery_variables import Recovery, torchruns_variables

logger = logging.getLogger(__name__)

_NONCE = "disttrain/recovery"
_ROOT = "disttrain/recovery/"
_LONGEST_WAIT_S = 0.2


@contextmanager
def used(silence_s: float, exit_codes: Path) -> Iterator[None]:
    """Let torch's launcher start a `RecoveringAgent`; it names its class, and takes no other."""
    names: dict[str, Any] = vars(launcher)
    before = names["LocalElasticAgent"]
    names["LocalElasticAgent"] = partial(RecoveringAgent, silence_s, exit_codes)
    try:
        yield
    finally:
        names["LocalElasticAgent"] = before


class RecoveringAgent(LocalElasticAgent):
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
        self._number = 0
        self._where: Recovery | None = None
        self._place: AgreementStore | None = None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Start all ranks of this host, after a rendezvous of the agents; return their process ids by local rank."""
        store, spec = worker_group.store, worker_group.spec
        assert store is not None
        if worker_group.group_rank == 0:
            store.set(_NONCE, uuid.uuid4().hex)
        nonce = store.get(_NONCE).decode()
        address: Any = spec.rdzv_handler
        self._where = Recovery(address.store.host, address.store.port, _ROOT + nonce, "", self._silence_s)
        self._place = AgreementStore(self._where)
        self._contexts, self._failures, self._number = {}, {}, 0
        self._names = {local_rank: self._new_name(local_rank) for local_rank in range(spec.local_world_size)}
        self._place.run(change(started, self._host, list(self._names.values()), worker_group.group_world_size or 1))
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
        self._contexts[local_rank] = start_processes(
            name=spec.role,
            entrypoint=spec.entrypoint,
            args={0: spec.args},
            envs={0: {**torchruns_variables(worker_group, local_rank, self._restarts_used()), **where.variables()}},
            logs_specs=DefaultLogsSpecs(os.devnull),
            start_method=self._start_method,
        )
        worker_group.workers[local_rank].id = self._contexts[local_rank].pids()[0]

    def _restarts_used(self) -> int:
        return int(self._worker_group.spec.max_restarts - self._remaining_restarts)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Wait a moment for the end of a rank; tell the store, and start another in its place."""
        assert self._place is not None
        _wait_for_an_end(self._pids(), _LONGEST_WAIT_S)
        try:
            died_now = self._tell_ends()
            state = self._place.state()
            while (reason := end_of(state, self._number)) is not None:  # again: who announced it may have died
                self._place.run(announce(self._number, reason))
                if self._number == state.number:
                    break
                self._number += 1
            if state.restart is None and not state.finished:
                for local_rank in died_now:
                    self._start_again(worker_group, local_rank)
        except TooFewLeftError as error:
            print(error, file=sys.stderr)
            return self._failed()
        if state.restart is not None:
            print(f"all ranks start again from the newest checkpoint: {state.restart}", file=sys.stderr)
            return self._failed()
        if self._contexts:
            return RunResult(state=WorkerState.HEALTHY)
        if state.finished:
            return RunResult(WorkerState.SUCCEEDED, {worker.global_rank: None for worker in worker_group.workers})
        return self._failed()

    def _tell_ends(self) -> list[int]:
        """Tell the store which ranks have ended; return the local ranks of those that have died."""
        assert self._place is not None
        died_now = []
        for local_rank, context in list(self._contexts.items()):
            if (result := context.wait(0)) is None:
                continue
            del self._contexts[local_rank]
            name = self._names[local_rank]
            if (failure := result.failures.get(0)) is None:
                self._place.run(change(finished, name))
                continue
            code = failure.exitcode
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            if code < 0:  # a killed rank could not print anything
                print(f"the rank with local rank {local_rank} {how}", file=sys.stderr)
            self._failures[local_rank] = failure
            self._place.run(change(died, name, f"{name} {how}"))
            died_now.append(local_rank)
        return died_now

    def _start_again(self, worker_group: WorkerGroup, local_rank: int) -> None:
        """Start a new rank in the place of one that died, while restarts are left."""
        assert self._place is not None
        if self._remaining_restarts <= 0:
            print(f"local rank {local_rank} is not started again: --max-restarts are used up", file=sys.stderr)
            if self._contexts:  # the run's exit code is that of the ranks that go on
                self._report_of(local_rank).unlink(missing_ok=True)
            return
        self._remaining_restarts -= 1
        self._report_of(local_rank).unlink(missing_ok=True)
        self._names[local_rank] = self._new_name(local_rank)
        self._place.run(change(started, self._host, [self._names[local_rank]]))
        self._start_rank(worker_group, local_rank)

    def _report_of(self, local_rank: int) -> Path:
        return self._exit_codes / str(local_rank)

    def _failed(self) -> RunResult:
        """Return a result upon which torch's agent restarts all ranks, or ends if no restarts are left."""
        workers = self._worker_group.workers
        failures = {workers[local_rank].global_rank: failure for local_rank, failure in self._failures.items()}
        if not failures:
            failures = {workers[0].global_rank: ProcessFailure(0, workers[0].id or 0, 1, os.devnull)}
        return RunResult(WorkerState.FAILED, failures=failures)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """Signal all ranks of this host, and kill those that do not end within `timeout` seconds.

        Meanwhile they may still recover: a rank that leaves its generation waits for the next one, to save in it.
        """
        deadline = time.monotonic() + timeout
        for context in self._contexts.values():
            with suppress(ProcessLookupError):
                os.kill(context.pids()[0], death_sig)
        while self._contexts and (rest_s := deadline - time.monotonic()) > 0:
            _wait_for_an_end(self._pids(), min(rest_s, _LONGEST_WAIT_S))
            with suppress(TooFewLeftError):
                self._tell_ends()
        for context in self._contexts.values():
            context.close(signal.SIGKILL)
        self._contexts = {}
        super()._shutdown(death_sig, timeout)  # it has no context of its own, but other things that end

    def _pids(self) -> list[int]:
        return [context.pids()[0] for context in self._contexts.values()]


def _wait_for_an_end(pids: list[int], at_most_s: float) -> None:
    """Wait until one of the processes ends; they are no children of this process, but of the server."""
    if not hasattr(os, "pidfd_open"):  # Linux has it
        time.sleep(min(0.02, at_most_s))
        return
    files: list[int] = []
    try:
        files.extend(os.pidfd_open(pid) for pid in pids)
        select.select(files, [], [], at_most_s)
    except ProcessLookupError:
        return  # it has ended already
    finally:
        for file in files:
            os.close(file)
