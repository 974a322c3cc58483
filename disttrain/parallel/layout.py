"""The layout of a model's parameters over ranks and devices, and how to read, scale, save and load them.

*Contract*: a strategy (`strategies.py`) makes the layout once, on every rank, after the model is built and before its
optimizer is built. Code that needs more of a parameter, a gradient or an optimizer state than this rank holds calls
the layout, so no other code knows the strategy.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

Cuts = Callable[[str, tuple[int, ...]], Any]
"""(path in a checkpoint's state, shape) -> (device mesh, placements) of the DTensor; None for a whole tensor."""


class Layout(Protocol):
    """The layout of a model over ranks and devices. All ranks call its methods in the same order."""

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Raise ConfigError for an optimizer, with the groups that handlers gave it, that would give other bits."""

    def step_whole(self, optimizer: Optimizer) -> None:
        """Let `optimizer.step` step whole parameters, for an optimizer that looks across a parameter."""

    def show_flags(self) -> None:
        """Give what autograd sees of the parameters their present `requires_grad`."""

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the 2-norm of all gradients together: 0-dimensional, on their device, the same bits on every rank."""

    def clip(self, parameters: Sequence[Tensor], limit: float, norm: Tensor) -> None:
        """Scale the gradients of `parameters` down to the norm `limit`, if their norm, `norm`, is larger."""

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a parameter, a gradient or an optimizer state as a plain tensor with all its values, on every rank."""

    def gathered(self) -> AbstractContextManager[None]:
        """Return a context in which each rank may call the model any number of times, without a collective."""

    def cut(self, batch: Any) -> Any:
        """Cut a batch that lies on the device over the devices of this rank."""

    def bring_together(self, outputs: Any) -> Any:
        """Lay outputs whole on each device of this rank, so that its host can read them."""

    def stateful(self, part: Any) -> Any:
        """Return a model, an optimizer or a kept object in the form that a checkpoint saves and loads."""

    def cuts(self, parts: Mapping[str, nn.Module], optimizer: Optimizer, kept: Mapping[str, Any]) -> Cuts | None:
        """Return the cut of each tensor that a checkpoint loads as a DTensor; None if there are no such tensors.

        `parts` and `kept`: the modules (`Run.parts`) and the further objects (`Run.keep`) of a run, by name.
        """


class ReplicatedLayout:
    """Every rank holds every parameter whole."""

    def check_optimizer(self, optimizer: Optimizer) -> None:
        return

    def show_flags(self) -> None:
        return

    def step_whole(self, optimizer: Optimizer) -> None:
        return

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return total_norm(gradients)

    def clip(self, parameters: Sequence[Tensor], limit: float, norm: Tensor) -> None:
        nn.utils.clip_grads_with_norm_(list(parameters), limit, norm)

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def cut(self, batch: Any) -> Any:
        return batch

    def bring_together(self, outputs: Any) -> Any:
        return outputs

    def stateful(self, part: Any) -> Any:
        return part

    def cuts(self, parts: Mapping[str, nn.Module], optimizer: Optimizer, kept: Mapping[str, Any]) -> Cuts | None:
        return None


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together, with the same bits as torch's function in two thirds of its time."""
    if len({(gradient.device, gradient.dtype) for gradient in gradients}) != 1:
        return norm_of_norms([torch.linalg.vector_norm(gradient) for gradient in gradients])
    return norm_of_norms(torch._foreach_norm(list(gradients)))


def norm_of_norms(norms: Sequence[Tensor]) -> Tensor:
    """Return the norm of all tensors together from the norm of each, in their order."""
    dtype = functools.reduce(torch.promote_types, [norm.dtype for norm in norms])
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, dtype) for norm in norms]))
    return norm


@torch.no_grad()
def take_from_first_rank(tensors: Sequence[Tensor], process_group: ProcessGroup | None) -> None:
    """Give every rank the values of rank 0's tensors, which have the same shapes on all."""
    for tensor in tensors:
        whole = tensor.detach().contiguous()
        dist.broadcast(whole.view(-1).view(torch.uint8), group=process_group, group_src=0)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)


def part_here(tensor: Tensor) -> Tensor:
    """Return a tensor, or this rank's part of one that is cut over the ranks, without its graph."""
    detached: Any = tensor.detach()
    here: Tensor = detached.to_local() if hasattr(detached, "to_local") else detached
    return here
