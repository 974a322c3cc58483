"""A loss over the embeddings of a whole global batch, with the activations of one slot at a time.

*Contract*: a step runs its slots twice. In the first pass each slot gives its embeddings, without a graph. Those of all
slots, concatenated along dimension 0 in slot order, are the same on every rank, and so are the loss over them and its
gradient. In the second pass each slot runs again under its seed, and its backward begins with its part of that
gradient. The sum over the slots is then the gradient of the loss over the global batch, and is not divided. A gradient
of the loss's own parameters, which every rank computes, counts once: with slot 0.

*Errors*: ConfigError for embeddings that differ in form between slots or passes, for a loss that depends on none of
them, and for collectives in the user's code.

*Cost*: one more forward for each slot, and a copy of its batch. Every rank holds the embeddings of the global batch and
computes the loss over them. For each tensor of the embeddings one all-gather.

*Source*: GradCache (Gao et al., 2021, arXiv:2101.06983).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from disttrain.errors import ConfigError
from disttrain.parallel.fingerprints import fingerprints_by_place
from disttrain.parallel.slot_checks import CHECKED_STEPS
from disttrain.parallel.slots import Slots
from disttrain.parallel.user_collectives import without_collectives

ROUNDING = 0.1
"""The largest part of the embeddings' norm by which two runs of one slot may differ: more than bfloat16 rounds."""
ROWS_ADVICE = "give every sample one row, padded if need be, in every slot; a mask may be one of the tensors"
GATHERED = "global_loss gets the embeddings of all slots of all ranks, and the gradients meet by themselves"


class GlobalLoss:
    """The loss over all slots of the newest step.

    `embed(microbatch)` returns a slot's embeddings: a tensor, or a dict or tuple of tensors, each [slot samples, ...].
    `loss(embeddings)` returns one number; `backward(loss)` adds its gradients to `.grad`, scaled as the precision does.
    `parameters()` are those that the loss may use, as autograd sees them. All ranks make this object and call it alike.
    """

    def __init__(
        self,
        slots: Slots,
        process_group: ProcessGroup | None,
        *,
        embed: Callable[[Any], Any],
        loss: Callable[[Any], Tensor],
        backward: Callable[[Tensor], None],
        parameters: Callable[[], Iterable[Tensor]],
    ) -> None:
        if process_group is None and slots.world_size > 1:
            raise ValueError(f"world_size={slots.world_size} needs a process group, got None")
        self.slot = 0
        """The slot that runs now in the second pass."""
        self._slots = slots
        self._group = process_group if slots.world_size > 1 else None
        self._embed = embed
        self._loss = loss
        self._backward = backward
        self._parameters = parameters
        self._steps_left = CHECKED_STEPS
        self._form: tuple[str, ...] | None = None
        self._agreed = False
        self._structure: Any = None
        self._mine: list[list[Tensor]] = []
        self._whole: list[Tensor] = []
        self._gradients: list[Tensor | None] = []
        self._own: list[tuple[Tensor, Tensor]] = []
        self._value = torch.zeros(())

    def begin(self) -> None:
        """Drop what the previous step has left, even if it failed."""
        self._mine, self._whole, self._gradients, self._own = [], [], [], []

    def look_at(self, microbatch: Any) -> None:
        """Run one slot of the first pass; call it for this rank's slots in their order."""
        with without_collectives(self._group, "forward", GATHERED), torch.no_grad():
            embeddings = self._leaves(self._embed(microbatch))
        self._mine.append([each.detach().clone() for each in embeddings])

    def exchange(self) -> None:
        """Get the embeddings of all slots. A collective."""
        self._agree_on_form()
        self._whole = [self._of_all_slots(parts) for parts in zip(*self._mine, strict=True)]
        self._mine = []

    def compute(self) -> None:
        """Compute the loss over all slots, and its gradient by the embeddings and by its own parameters."""
        leaves = [each.detach().requires_grad_(_is_float(each)) for each in self._whole]
        # Not the leaves themselves, which no loss could change in place.
        given = tree_unflatten([each.clone() for each in leaves], self._structure)
        with without_collectives(self._group, "global_loss", GATHERED):
            loss = self._loss(given)
        if loss.requires_grad:
            self._backward(loss)
        self._gradients = [None if each.grad is None else self._by_slot(each.grad) for each in leaves]
        if all(each is None for each in self._gradients):
            raise ConfigError(
                "global_loss: expected a number that depends on the embeddings, got one that has no gradient by any "
                "of them; compute it from what it is given, without detach() or no_grad()"
            )
        self._own = [(each, each.grad) for each in self._parameters() if each.grad is not None]
        for parameter, _ in self._own:
            parameter.grad = None
        self._value = loss.detach()

    def fingerprints(self) -> list[int]:
        """Return numbers that differ if a bit of the computed loss or its gradient does."""
        return fingerprints_by_place([self._value, *self._gradients, *(gradient for _, gradient in self._own)])

    def slot_loss(self, embeddings: Any) -> Tensor:
        """Return the loss over all slots; its backward goes through the embeddings of the running slot alone."""
        inputs, gradients = [], []
        leaves = self._leaves(embeddings)
        if self._steps_left:
            self._compare(leaves)
        for leaf, gradient in zip(leaves, self._gradients, strict=True):
            if leaf.requires_grad and gradient is not None:
                inputs.append(leaf)
                gradients.append(gradient[self.slot])
        for parameter, gradient in self._own:
            inputs.append(parameter)
            gradients.append(gradient.clone() if self.slot == 0 else torch.zeros_like(gradient))
        if not inputs:
            raise ConfigError(
                "forward: expected embeddings that depend on a trained parameter, got none; return what the model "
                "computes, without detach() or no_grad()"
            )
        loss: Tensor = _Known.apply(self._value, gradients, *inputs)  # type: ignore[no-untyped-call]
        return loss

    def end(self) -> None:
        """End a step."""
        self.begin()
        self._steps_left = max(0, self._steps_left - 1)

    def _leaves(self, embeddings: Any) -> list[Tensor]:
        """Return the tensors of a slot's embeddings; ConfigError if their form is not that of all slots before."""
        named, self._structure = tree_flatten_with_path(embeddings)
        form = tuple(f"{keystr(path)} {each.dtype} {list(each.shape)}".lstrip() for path, each in named)
        if self._form is None:
            self._form = form
        if form != self._form:
            raise ConfigError(_other_form(self._form, form))
        return [each for _, each in named]

    def _agree_on_form(self) -> None:
        """Compare the form with that of the other ranks, once; it stays the same then."""
        if self._group is None or self._agreed:
            return
        by_rank: list[Any] = [None] * self._group.size()
        dist.all_gather_object(by_rank, self._form, group=self._group)
        for form in by_rank:
            if form != by_rank[0]:
                raise ConfigError(_other_form(by_rank[0], form))
        self._agreed = True

    def _of_all_slots(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the rows of all slots in slot order, in memory of their own: laid out alike on any number of ranks."""
        counts = self._slots.counts
        mine = parts[0].new_zeros((max(counts), *parts[0].shape))
        for place, part in enumerate(parts):
            mine[place] = part
        if self._group is None:
            return mine.flatten(0, 1)
        by_rank = [torch.empty_like(mine) for _ in counts]
        rooms = [each.view(-1).view(torch.uint8) for each in by_rank]
        dist.all_gather(rooms, mine.view(-1).view(torch.uint8), group=self._group)
        return torch.cat([each[:count] for each, count in zip(by_rank, counts, strict=True)]).flatten(0, 1)

    def _by_slot(self, rows: Tensor) -> Tensor:
        """Return the rows of all slots as [num_slots, slot samples, ...]."""
        return rows.view(self._slots.num_slots, -1, *rows.shape[1:])

    def _compare(self, leaves: Sequence[Tensor]) -> None:
        """Raise ConfigError if the second pass gives other embeddings than the first, by more than rounding."""
        for leaf, whole in zip(leaves, self._whole, strict=True):
            if not _is_float(leaf):
                continue
            there = self._by_slot(whole)[self.slot]
            wide = torch.complex64 if leaf.is_complex() else torch.float32
            here, there = leaf.detach().to(wide), there.to(wide)
            if (here - there).norm() > ROUNDING * there.norm():
                raise ConfigError(
                    f"forward: with global_loss each slot runs twice, first without gradients, but slot {self.slot} "
                    "gives other embeddings in the second run. Expected embeddings that depend on weights, buffers, "
                    "batch and seed alone, and not on whether gradients are on"
                )


class _Known(torch.autograd.Function):
    """A number whose gradients are known already; they are scaled, so that of the number itself is not used."""

    @staticmethod
    def forward(context: Any, value: Tensor, gradients: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        context.known = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, scale: Tensor) -> Any:
        return None, None, *context.known


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _other_form(one: Sequence[str], other: Sequence[str]) -> str:
    return (
        f"forward: expected embeddings of one form in all slots, got {', '.join(one) or 'none'} and "
        f"{', '.join(other) or 'none'}; {ROWS_ADVICE}"
    )
