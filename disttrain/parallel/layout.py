"""How the parameters of a model lie over the ranks, and what follows from it for whoever reads or scales them.

*Contract*: `shard` (in this room's `__init__`) is called once, on every rank, when the model is built and before its
optimizer is: what it returns is a `Layout`. Everybody who needs more of a parameter, a gradient or an optimizer state
than what this rank holds asks the layout, so that nobody else has to know the strategy.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Cuts = Callable[[str, tuple[int, ...]], Any]
"""(path in a checkpoint's state, shape) -> (device mesh, placements) of the DTensor; None for a whole tensor."""


class Layout(Protocol):
    """What the strategies differ in, beside how gradients meet. All ranks call a method in the same order."""

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """ConfigError for an optimizer that would give other bits than on whole parameters."""

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the 2-norm of all gradients together, 0-dimensional, on their device: the same bits on every rank."""

    def clip(self, parameters: Sequence[Tensor], limit: float, norm: Tensor) -> None:
        """Scale the gradients of `parameters`, whose norm is `norm`, down to `limit`, if it is larger."""

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a parameter, a gradient or an optimizer state as a plain tensor with all its values, on every rank."""

    def gathered(self) -> AbstractContextManager[None]:
        """Return a context in which the model can be called without a collective, as often as each rank likes."""

    def stateful(self, part: Any) -> Any:
        """Return the model, or its optimizer, as what a checkpoint saves and loads."""

    def cuts(self, model: nn.Module, optimizer: Optimizer) -> Cuts | None:
        """Return which tensors of a checkpoint are to be loaded as DTensors, and how cut; None: none of them."""


class Replicated:
    """Every rank holds every parameter whole."""

    def check_optimizer(self, optimizer: Optimizer) -> None:
        return

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        return total_norm(gradients)

    def clip(self, parameters: Sequence[Tensor], limit: float, norm: Tensor) -> None:
        nn.utils.clip_grads_with_norm_(list(parameters), limit, norm)

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    def stateful(self, part: Any) -> Any:
        return part

    def cuts(self, model: nn.Module, optimizer: Optimizer) -> Cuts | None:
        return None


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together; the same bits as torch's, in two thirds of its time."""
    if len({(gradient.device, gradient.dtype) for gradient in gradients}) != 1:
        return norm_of_norms([torch.linalg.vector_norm(gradient) for gradient in gradients])
    return norm_of_norms(torch._foreach_norm(list(gradients)))


def norm_of_norms(norms: Sequence[Tensor]) -> Tensor:
    """Return the norm of all from the norms of each, in their order."""
    dtype = functools.reduce(torch.promote_types, [norm.dtype for norm in norms])
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, dtype) for norm in norms]))
    return norm
