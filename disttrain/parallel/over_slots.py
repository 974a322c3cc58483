"""A step over this rank's slots: what is alike wherever parameters lie and however gradients meet.

*Contract*: a step runs this rank's microbatches in slot order. Before each one, torch's generators are seeded with
`seed_for(seed, "step", step, slot)`, step = iteration - 1, and the buffers with which the step began are restored.
Python's and numpy's generators belong to the data and are left alone. A strategy says what happens around the loop
(`_step`), and drops there what a failed step has left (`_begin`). With a global loss, all slots run once before that,
without gradients (`global_loss.py`); that pass leaves no buffer moved.

*Errors*: ConfigError for a model that cannot give the same bits on any number of ranks, before the first step or, for
what shows only in a forward, in the first steps (`slot_checks.py`). ValueError for another number of microbatches.

*Cost*: reads the list of the model's parameters once a step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from disttrain.errors import ConfigError, FaultyRank
from disttrain.parallel.audit import Audit, StepAgain
from disttrain.parallel.audit_exchange import SentPieces
from disttrain.parallel.buffers import SlotBuffers
from disttrain.parallel.global_loss import GlobalLoss
from disttrain.parallel.gradients import GradientProgress
from disttrain.parallel.model_checks import check_model
from disttrain.parallel.rehearsal import Rehearsal, deep_copy
from disttrain.parallel.slot_checks import SlotChecks
from disttrain.parallel.slots import Slots
from disttrain.parallel.trained_parameters import TrainedParameters
from disttrain.parallel.user_collectives import without_collectives
from disttrain.parallel.weights import SlotWeights, WeightOf
from disttrain.seeding import seed_for, seed_torch

SlotWatch = Callable[[Iterator[Any], int], Iterator[Any]]
"""(the microbatches of a step, its number from 1) -> the same microbatches; rehearsals are among them."""

ALONE = (
    "a slot may not depend on the ranks, and the gradients meet by themselves; a loss that compares the samples of all "
    "slots is global_loss (docs/contrastive.md)"
)


class GradientsOverSlots(ABC):
    """The base of the gradients of runs that are cut into slots; the step calls `module`.

    A subclass sets `_buffers`, `_checks` and `_rehearsal`. In an audited step it shows the gradients of each slot to
    the audit (`_audited`), drops those that are computed again, and sends nothing before the loop of `_in_turn` ends.
    """

    several = True
    divisor = 1
    calls_ranks_in_slots = False
    """Whether the forward or the backward of a slot calls the other ranks even if its gradients are not sent."""
    progress: GradientProgress | None = None
    watch: SlotWatch | None = None
    """Sees each microbatch as the step body takes it, and its gradients before they are taken off the parameters."""
    _buffers: SlotBuffers
    _checks: SlotChecks
    _rehearsal: Rehearsal
    _global_loss: GlobalLoss | None = None
    audit: Audit | None = None
    """Computes each slot of some steps again on another rank; None: of no step."""
    _is_again = False
    """Whether the microbatch that was yielded last is computed again, for the audit."""

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        *,
        seed: int,
        process_group: ProcessGroup | None,
        device: torch.device | None,
        weight_of: WeightOf | None = None,
    ) -> None:
        check_model(model, device)
        self.slots = slots
        self.module = model
        self._seed = seed
        self._process_group = process_group
        self._trained = TrainedParameters(model, process_group)
        self._unused: set[int] = set()
        self.weights = SlotWeights(slots, process_group, weight_of, self._trained.tensors[0].device)

    def minimize(self, global_loss: GlobalLoss, *, rehearses: bool) -> None:
        """Train on a loss over the global batch, from which the step gets each slot's loss; call it before any step.

        With `rehearses` the first step computes it twice, and refuses it if its gradient changes.
        """
        self._global_loss = global_loss
        self._loss_rehearsal = Rehearsal(self.module, rehearses=rehearses)
        self.weights.divides = False

    @property
    def rehearsing(self) -> bool:
        return self._rehearsal.is_on or self._is_again

    def audits(self, iteration: int) -> Audit | None:
        """Return the audit of a step, counted from 1; None if it has none."""
        return self.audit if self.audit is not None and self.audit.is_due(iteration) else None

    def opens(self, iteration: int) -> bool:
        return True

    def closes(self, iteration: int) -> bool:
        return True

    def microbatches(self, batch: Sequence[Any], iteration: int) -> Iterator[Any]:
        """Yield the microbatches of this rank's slots; `batch` holds one for each, in slot order."""
        self.slots.check_batch(batch)
        self._checks.check_parameters()
        if self._trained.changed():
            self._lay_out()
        self._begin()
        self.weights.begin(batch)
        if self.progress is not None:
            self.progress.begin(iteration)
        microbatches = self._step(batch, iteration)
        yield from microbatches if self.watch is None else self.watch(microbatches, iteration)
        if self.progress is not None:
            self.progress.over = True
        self._trained.warn_of_unused(self._unused, iteration=iteration, rank=self.slots.rank)

    def close(self) -> None:
        """Release the model."""
        self.module = nn.Identity()

    @abstractmethod
    def _step(self, batch: Sequence[Any], iteration: int) -> Iterator[Any]:
        """Yield the microbatches of one step; at its end the trained parameters have their gradients."""

    @abstractmethod
    def _lay_out(self) -> None:
        """Prepare for the trained parameters of the next steps."""

    def _begin(self) -> None:
        """Drop the state of the previous step, even if it failed."""
        for parameter in self._trained.tensors:
            parameter.grad = None
        self._unused = set(range(len(self._trained.tensors)))

    def _in_turn(self, batch: Sequence[Any], iteration: int) -> Iterator[tuple[int, Any]]:
        """Yield (slot, microbatch) for this rank's slots, each with the step's buffers and the slot's own seed.

        This is the one place that fixes the seed of a slot's forward: it is made of the run's seed, the step and the
        slot. The first slot of a process may be yielded twice; `Rehearsal.takes` is called after each backward.
        """
        self._checks.step_starts(iteration)
        if (audit := self.audits(iteration)) is not None:
            audit.begins(batch, iteration)
            self._buffers.step_is_audited()
        if self._global_loss is not None:
            self._look_ahead(self._global_loss, batch, iteration)
        for copied in self._rehearsal.copy(batch[0]):
            slot = self.slots.mine[0]
            slot_seed = seed_for(self._seed, "step", iteration - 1, slot)
            self._buffers.rehearsal_starts()
            self._checks.slot_starts()
            if self._global_loss is not None:
                self._global_loss.slot = slot
            with self._rehearsal.runs(slot_seed), self._no_collectives():
                self._seed_generators(slot_seed)
                yield slot, copied
            self._checks.slot_ends()
            self._buffers.rehearsal_ends()
        for slot, microbatch in zip(self.slots.mine, batch, strict=True):
            self._buffers.slot_starts(slot)
            self._seed_generators(seed_for(self._seed, "step", iteration - 1, slot))
            self._checks.slot_starts()
            if self._global_loss is not None:
                self._global_loss.slot = slot
            yield slot, microbatch
            self._checks.slot_ends()
            self._buffers.slot_ends(slot)
        if audit is not None:
            yield from self._again(audit, iteration)
        if self._global_loss is not None:
            self._global_loss.end()
        self._checks.step_ends()

    def _again(self, audit: Audit, iteration: int) -> Iterator[tuple[int, Any]]:
        """Yield the slots that this rank computes again, its own or another rank's, as their owner computes them."""
        unused, self._is_again = set(self._unused), True
        try:
            for slot, microbatch in audit.again():
                self._buffers.again_starts()
                self._seed_generators(seed_for(self._seed, "step", iteration - 1, slot))
                self._checks.slot_starts()
                if self._global_loss is not None:
                    self._global_loss.slot = slot
                yield slot, microbatch
                self._checks.slot_ends()
                self._buffers.again_ends()
        except (StepAgain, FaultyRank):
            self._buffers.step_is_undone()
            raise
        finally:
            self._is_again, self._unused = False, unused

    def _met(self, audit: Audit, pieces: SentPieces, gradient: Sequence[Tensor]) -> None:
        """Show the audit how the gradients have met; if they have to meet again, put everything back before."""
        try:
            audit.met(pieces, gradient)
        except StepAgain:
            self._buffers.step_is_undone()
            self._checks.step_is_undone()
            raise

    def _audited(self, audit: Audit, slot: int, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Take a slot's gradients off the parameters, and show them to the audit."""
        gradient = self._taken_off(parameters)
        audit.computed(slot, gradient, self._buffers.now() if slot == 0 else ())
        return gradient

    def _no_collectives(self) -> AbstractContextManager[None]:
        """Refuse collectives in the rehearsal, which sends nothing itself."""
        if self.calls_ranks_in_slots:
            return nullcontext()
        return without_collectives(self._process_group, "the forward", ALONE)

    def _look_ahead(self, global_loss: GlobalLoss, batch: Sequence[Any], iteration: int) -> None:
        """Run this rank's slots without gradients, and compute the loss over those of all ranks.

        The slots leave nothing behind; buffers of the loss itself keep what it does to them, the same on every rank.
        """
        global_loss.begin()
        for slot, microbatch in zip(self.slots.mine, batch, strict=True):
            copied = _copied(microbatch)
            self._buffers.rehearsal_starts()
            self._seed_generators(seed_for(self._seed, "step", iteration - 1, slot))
            self._checks.slot_starts()
            global_loss.look_at(copied)
            self._checks.slot_ends()
            self._buffers.rehearsal_ends()
        with nullcontext() if self.progress is None else self.progress.waits():
            global_loss.exchange()
        seed = seed_for(self._seed, "global", iteration - 1)
        for _ in self._loss_rehearsal.copy(None):
            self._buffers.rehearsal_starts()
            with self._loss_rehearsal.runs(seed):
                self._compute(global_loss, seed)
            self._buffers.rehearsal_ends()
        self._compute(global_loss, seed)

    def _compute(self, global_loss: GlobalLoss, seed: int) -> None:
        """Compute the loss over all slots; ConfigError if it changes a parameter, or differs from its rehearsal."""
        self._seed_generators(seed)
        self._checks.slot_starts()
        global_loss.compute()
        self._checks.slot_ends()
        if self._loss_rehearsal.watches:
            fingerprints = global_loss.fingerprints()
            self._loss_rehearsal.keeps(["the embeddings (by global_loss)"] * len(fingerprints), fingerprints)

    def _seed_generators(self, seed: int) -> None:
        """Seed torch's generators, including those of the devices."""
        seed_torch(seed)

    def _taken_off(self, parameters: Sequence[Tensor], index: Iterable[int] | None = None) -> list[Tensor]:
        """Take a slot's gradients off all parameters, or those at `index`, and note which the slot has used.

        `parameters`: the trained ones in their order, as autograd sees them. One that was not used has gradient zero.
        """
        taken = []
        for i in range(len(parameters)) if index is None else index:
            parameter = parameters[i]
            gradient = parameter.grad
            if gradient is None:
                taken.append(torch.zeros_like(parameter))
                continue
            if gradient.layout != torch.strided:
                raise ConfigError(
                    f"the gradient of a parameter of shape {list(parameter.shape)} is sparse, and cannot be summed in "
                    "a fixed order; use sparse=False"
                )
            taken.append(gradient)
            parameter.grad = None
            self._unused.discard(i)
        return taken


def _copied(microbatch: Any) -> Any:
    """Return a copy of a microbatch, which a forward may change or use up; ConfigError if there can be none."""
    try:
        return deep_copy(microbatch)
    except Exception as error:  # a generator, a tensor with a graph: whatever the user's objects raise
        raise ConfigError(
            f"global_loss: each slot runs twice, but its batch cannot be copied ({type(error).__name__}: {error}); "
            "expected a batch of tensors and plain values"
        ) from error
