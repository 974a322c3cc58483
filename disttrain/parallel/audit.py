"""The audit of a step: every slot is computed again by another rank, and the two gradients are compared bit by bit.

*Contract*: in a step (from 0) with `step % every_steps == every_steps - 1` each rank runs its own slots, and then those
of the rank before it, with the same seeds, buffers and microbatches. Hashes of each slot's gradient go to all ranks.
Nothing is updated before they agree, so an audited step has the bits of any other. If two ranks disagree on a
slot, both compute it again, and so does a third rank if there is one; `audit_verdicts` says who is faulty. On one rank
the same rank computes again: that finds what happens once, and not what it always gets wrong.

After that the gradients meet. What was sent is held against what arrived (`audit_exchange`), and the sums that the
ranks end with are compared, before the update.

The hash of slot 0 is also that of the buffers that it leaves, which all ranks take.

*Errors*: on every rank alike: StepAgain if what is faulty now computes right again, so the step can be done again;
FaultyRank if it does not, or if it cannot be told who it is. ConfigError for a batch that cannot be sent.

*Cost*: nothing in other steps. An audited step computes about twice as long, sends its microbatches and a few hashes,
and sends its gradients only after that. It holds one more copy of the gradients of a slot.
"""

import hashlib
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from disttrain.errors import ConfigError, FaultyRank
from disttrain.parallel.audit_exchange import SentPieces, exchange_faults
from disttrain.parallel.audit_verdicts import Fault, judge, judge_at_once
from disttrain.parallel.fingerprints import fingerprints_by_place
from disttrain.parallel.packed_batches import packed, unpacked
from disttrain.parallel.slots import Slots

Machine = tuple[str, str]
"""The host and the device of a rank."""


class StepAgain(Exception):
    """The faults of this attempt at a step, after which it can be done again: nothing has been updated."""

    def __init__(self, faults: Sequence[Fault], batch: Sequence[Any]) -> None:
        super().__init__(f"the step has to be done again: {[fault.what for fault in faults]}")
        self.faults = list(faults)
        self.batch = batch
        """This rank's microbatches as they were before the attempt."""


class Audit:
    """The audit of one rank's steps; every rank makes one.

    `passed()` is called when an audited step has been found right, before its update.
    """

    def __init__(
        self,
        slots: Slots,
        process_group: ProcessGroup | None,
        *,
        every_steps: int,
        device: torch.device,
        passed: Callable[[], None] = lambda: None,
    ) -> None:
        self.every_steps = every_steps
        self.passed = passed
        self.machines: list[Machine] = []
        """The host and the device of each rank; known after the first audited step."""
        self.sound_step = 0
        """The newest step that has passed its audit in this process; 0: none yet."""
        self.machine: Machine = (socket.gethostname(), str(device))
        self._device = device
        self._step = 0
        self._slots = slots
        self._group = process_group if slots.world_size > 1 else None
        self._before = (slots.rank - 1) % slots.world_size
        self._mine: list[bytes] = []
        self._theirs: list[bytes] = []
        self._answers: dict[int, list[str]] = {}

    def is_due(self, iteration: int) -> bool:
        """Return whether a step, counted from 1, is audited."""
        return iteration % self.every_steps == 0

    def begins(self, batch: Sequence[Any], iteration: int) -> None:
        """Send this rank's microbatches to the rank after it, before a forward may change them."""
        self._step, self._answers = iteration, {}
        self._mine, problem = [], None
        try:
            self._mine = [packed(microbatch) for microbatch in batch]
        except Exception as error:  # noqa: BLE001 - a generator, a lambda: whatever the user's objects raise
            problem = f"{type(error).__name__}: {error}"
        by_rank = self._gathered((self.machine, [len(each) for each in self._mine], problem))
        if problems := [each for _, _, each in by_rank if each is not None]:
            raise ConfigError(
                f"audit.every_steps: each slot is computed again, but its batch cannot be copied ({problems[0]}); "
                "expected a batch of tensors and plain values"
            )
        self.machines = [machine for machine, _, _ in by_rank]
        self._theirs = self._exchanged(by_rank[self._before][1])

    def computed(self, slot: int, gradient: Sequence[Tensor], buffers: Sequence[Tensor] = ()) -> None:
        """Take the gradient of a slot that this rank has computed, before it is added to another one.

        `buffers`: what the slot has left in the buffers, if that counts.
        """
        self._answers.setdefault(slot, []).append(_digest([*gradient, *buffers]))

    def met(self, pieces: SentPieces, gradient: Sequence[Tensor]) -> None:
        """Compare what was sent with what arrived, and `gradient`, the sum over all slots, with that of the others.

        `gradient` is empty where each rank has another part of it. The audit of the step ends here.
        *Errors*: StepAgain if the ranks disagree.
        """
        by_rank = self._gathered((pieces.prints(), _digest(gradient)))
        faults = exchange_faults([prints for prints, _ in by_rank])
        if not faults:
            judged = judge_at_once("the sum of the gradients", [digest for _, digest in by_rank])
            faults = [replace(fault, kind="transient") for fault in judged]
        if faults:
            raise StepAgain(faults, [unpacked(data) for data in self._mine])
        self.passed()
        self.sound_step = self._step

    def again(self) -> Iterator[tuple[int, Any]]:
        """Yield (slot, microbatch) for each slot that this rank computes again; `computed` is called after each.

        *Errors*: StepAgain, FaultyRank if the ranks disagree. The end of the iterator means that all slots are right.
        """
        for slot, data in zip(self._slots.of(self._before), self._theirs, strict=True):
            yield slot, unpacked(data)
        disputed = _differing(self._gathered(self._answers))
        if disputed:
            mine = {slot: self._mine[slot - self._slots.mine.start] for slot in disputed if slot in self._slots.mine}
            data_of = {slot: data for each in self._gathered(mine) for slot, data in each.items()}
            for slot in disputed:
                if self._slots.rank in self._asked(slot):
                    yield slot, unpacked(data_of[slot])
            self._decide(disputed)

    def _asked(self, slot: int) -> list[int]:
        """Return the ranks that compute a disputed slot: its owner, the rank after it, and the one after that."""
        owner, count = self._slots.owner(slot), self._slots.world_size
        return list(dict.fromkeys((owner + i) % count for i in range(3)))

    def _decide(self, disputed: Sequence[int]) -> None:
        """Raise what follows from the answers to the disputed slots."""
        by_rank = self._gathered(self._answers)
        faults: list[Fault] = []
        for slot in disputed:
            faults += judge(f"slot {slot}", {rank: each.get(slot, []) for rank, each in enumerate(by_rank)})
        if all(fault.kind == "transient" for fault in faults):
            raise StepAgain(faults, [unpacked(data) for data in self._mine])
        raise faulty_rank(self._step, faults, self.machines, self.sound_step)

    def _gathered(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank."""
        if self._group is None:
            return [value]
        by_rank: list[Any] = [None] * self._slots.world_size
        dist.all_gather_object(by_rank, value, group=self._group)
        return by_rank

    def _exchanged(self, sizes: Sequence[int]) -> list[bytes]:
        """Send the packed microbatches to the rank after this one; return those of the rank before, of these sizes."""
        if self._group is None:
            return self._mine
        sent = torch.frombuffer(bytearray().join(self._mine), dtype=torch.uint8).to(self._device)
        arrives = torch.empty(sum(sizes), dtype=torch.uint8, device=self._device)
        after = (self._slots.rank + 1) % self._slots.world_size
        ops = [
            dist.P2POp(dist.irecv, arrives, group=self._group, group_peer=self._before),
            dist.P2POp(dist.isend, sent, group=self._group, group_peer=after),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        return [each.numpy().tobytes() for each in torch.split(arrives.cpu(), list(sizes))]


def _digest(tensors: Sequence[Tensor]) -> str:
    """Return one text for the bits of some tensors."""
    return hashlib.blake2b(repr(fingerprints_by_place(tensors)).encode(), digest_size=16).hexdigest()


def _differing(by_rank: Sequence[dict[int, list[str]]]) -> list[int]:
    """Return the slots to which the ranks have given different answers."""
    found: dict[int, set[str]] = {}
    for answers in by_rank:
        for slot, given in answers.items():
            found.setdefault(slot, set()).update(given)
    return sorted(slot for slot, given in found.items() if len(given) > 1)


def faulty_rank(step: int, faults: Sequence[Fault], machines: Sequence[Machine], sound_step: int) -> FaultyRank:
    """Return the error for faults that do not let the step go on, the persistent ones first."""
    fault = min(faults, key=lambda each: ("persistent", "undecided", "transient").index(each.kind))
    named = [f"rank {rank} (host {machines[rank][0]}, {machines[rank][1]})" for rank in fault.ranks]
    since = f"step {sound_step}, the last one that passed an audit" if sound_step else "this launch began"
    found = (
        f"{' or '.join(named)} computes other bits than it should, and it cannot be told which of them"
        if len(fault.ranks) > 1
        else f"{named[0]} computes wrong bits, and did so again when it was asked again"
    )
    message = (
        f"the audit of step {step} found a faulty rank by {fault.what}: {found}. Nothing of this step was kept. What "
        f"the rank has computed since {since} may be wrong too: take its host out of the run, and resume from a "
        "checkpoint before that"
    )
    host, device = machines[fault.ranks[0]] if len(fault.ranks) == 1 else ("", "")
    return FaultyRank(message, step=step, ranks=fault.ranks, host=host, device=device, kind=fault.kind, what=fault.what)
