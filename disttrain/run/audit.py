"""The audited steps of a run: who is faulty is named, and a step that can be done again is done again.

*Contract*: in every `audit.every_steps`-th step, before the slots, the hashes of the ranks' whole states are compared
(under ddp: with fsdp each rank has shards that no other has). Then `parallel.Audit` compares the slots. A transient
fault has changed nothing that is kept, so the step is done again, with the bits of an undisturbed run. A persistent
fault, or one of which it cannot be told whose it is, raises FaultyRank on every rank before anything is updated.

Each fault is a line of `audits.jsonl` in the run directory, beside the ledger, whose lines are those of an undisturbed
run: {"step", "what", "rank" or "ranks", "host", "device", "kind"}. result.json has the same as "audit".

*Errors*: FaultyRank; ConfigError for a device whose steps cannot be audited.

*Cost*: one pass over the state and one gather in an audited step; see `parallel.audit` for the rest.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from disttrain.backend import Backend
from disttrain.config import Config
from disttrain.devices import device_row
from disttrain.engine.step_defaults import Step
from disttrain.errors import ConfigError, FaultyRank
from disttrain.evidence.ledger import differing, shortened
from disttrain.parallel import GradientsOverSlots, Slots
from disttrain.parallel.audit import Audit, StepAgain, faulty_rank
from disttrain.parallel.audit_verdicts import Fault, judge_at_once
from disttrain.run.directory import RunDirectory
from disttrain.run.slot_results import SlotResults

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""A step that meets a fault in each of so many attempts has a persistent one."""


class AuditedSteps:
    """The audit of a run; `begins` is called when its steps are about to begin."""

    def __init__(self, audit: Audit, backend: Backend, results: SlotResults, leaves_out: Callable[[int], bool]) -> None:
        self.num_audited = 0
        """Steps that this process has audited."""
        self._audit = audit
        self._backend = backend
        self._results = results
        self._leaves_out = leaves_out
        self._directory: RunDirectory | None = None
        self._hashes: Callable[[], dict[str, str]] | None = None
        self._tell: Callable[[str], None] = logger.warning
        audit.passed = results.release

    def begins(
        self, directory: RunDirectory, hashes: Callable[[], dict[str, str]] | None, tell: Callable[[str], None]
    ) -> None:
        """Write faults into `directory` from now on; `tell` shows a text on rank 0.

        `hashes()` returns those of this rank's whole state; None: no other rank has the same state.
        """
        self._directory, self._tell = directory, tell
        self._hashes = hashes if self._backend.world_size > 1 else None

    def around(self, step: Step) -> Step:
        """Return the step body, with an audit of the steps in which one is due."""

        def audited(engine: Any, batch: Any) -> Any:
            iteration = engine.state.iteration
            if not self._audit.is_due(iteration) or self._leaves_out(iteration):
                return step(engine, batch)
            try:
                outputs = self._attempts(step, engine, batch)
            except FaultyRank as error:
                self._note(iteration, [Fault(error.what, error.ranks, error.kind)])
                raise
            self.num_audited += 1
            return outputs

        return audited

    def entry(self) -> dict[str, Any]:
        """Return the entry of result.json: the steps that were audited in this launch, and all faults of the run."""
        faults = []
        if self._directory is not None and self._directory.audits_jsonl.exists():
            faults = faults_in(self._directory.audits_jsonl.read_text())
        return {"audit": {"steps": self.num_audited, "faults": faults}}

    def _attempts(self, step: Step, engine: Any, batch: Any) -> Any:
        """Do a step, and do it again as long as its faults are transient."""
        iteration = engine.state.iteration
        self._compare_states(iteration)
        found: list[Fault] = []
        for _ in range(MAX_ATTEMPTS):
            self._results.hold()
            try:
                return step(engine, batch)
            except StepAgain as again:
                found, batch = again.faults, again.batch
                self._note(iteration, found)
        faults = [Fault(fault.what, fault.ranks, "persistent") for fault in found]
        raise faulty_rank(iteration, faults, self._audit.machines, self._audit.sound_step)

    def _compare_states(self, iteration: int) -> None:
        """Raise FaultyRank if a rank holds another state than most."""
        if self._hashes is None:
            return
        hashes = self._hashes()
        by_rank = self._backend.all_gather((hash_of(hashes), self._audit.machine))
        if not (faults := judge_at_once("state", [digest for digest, _ in by_rank])):
            return
        self._audit.machines = [machine for _, machine in by_rank]
        all_hashes: list[dict[str, str]] = self._backend.all_gather(hashes)
        names = dict.fromkeys(name for each in all_hashes for name in differing(all_hashes[0], each))
        faults = [Fault(f"its state ({shortened(list(names))})", fault.ranks, fault.kind) for fault in faults]
        raise faulty_rank(iteration, faults, self._audit.machines, self._audit.sound_step)

    def _note(self, iteration: int, faults: Sequence[Fault]) -> None:
        """Write faults into audits.jsonl, and show them; on rank 0."""
        for fault in faults:
            line = fault_line(iteration, fault, self._audit.machines)
            logger.warning("audit: %s", json.dumps(line))
            if self._backend.rank == 0:
                self._tell(f"audit: {words(line)}")
                self._write(line)

    def _write(self, line: dict[str, Any]) -> None:
        if self._directory is None:
            return
        try:
            self._directory.check_held()
            with self._directory.audits_jsonl.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            logger.warning("audits.jsonl cannot be written: %s", error)


def build_audit(
    config: Config,
    slots: Slots,
    backend: Backend,
    gradients: GradientsOverSlots,
    results: SlotResults,
    leaves_out: Callable[[int], bool],
) -> AuditedSteps | None:
    """Let the gradients audit their steps as `config` asks for; None if it asks for no audit."""
    if not config.audit.every_steps:
        return None
    if device_row(backend.device).is_lazy:
        raise ConfigError(
            f"audit.every_steps: expected 0 on the device {backend.device}, whose operations are compiled into whole "
            f"steps, got {config.audit.every_steps}; leave it out, or use another device"
        )
    gradients.audit = Audit(slots, backend.process_group, every_steps=config.audit.every_steps, device=backend.device)
    return AuditedSteps(gradients.audit, backend, results, leaves_out)


def fault_line(step: int, fault: Fault, machines: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the line of audits.jsonl for a fault."""
    line: dict[str, Any] = {"step": step, "what": fault.what, "kind": fault.kind}
    if len(fault.ranks) > 1:
        return line | {"ranks": list(fault.ranks), "hosts": [machines[rank][0] for rank in fault.ranks]}
    [rank] = fault.ranks
    return line | {"rank": rank, "host": machines[rank][0], "device": machines[rank][1]}


def words(line: dict[str, Any]) -> str:
    """Return a line of audits.jsonl as a sentence."""
    if "ranks" in line:
        who = " or ".join(f"rank {rank} on {host}" for rank, host in zip(line["ranks"], line["hosts"], strict=True))
        return f"step {line['step']}, {line['what']}: {who} is faulty, and it cannot be told which"
    who = f"rank {line['rank']} on {line['host']} ({line['device']})"
    return f"step {line['step']}, {line['what']}: {who} is faulty, {line['kind']}"


def faults_in(text: str) -> list[dict[str, Any]]:
    """Return the faults in the text of audits.jsonl, without a line that a kill has cut short."""
    faults = []
    for line in text.splitlines():
        with suppress(ValueError):
            faults.append(json.loads(line))
    return faults


def hash_of(hashes: dict[str, str]) -> str:
    """Return one text for the hashes of a state."""
    return hashlib.blake2b(repr(sorted(hashes.items())).encode(), digest_size=16).hexdigest()
