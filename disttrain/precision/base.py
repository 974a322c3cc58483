"""The protocol of a precision: three methods of a step, a preparation before them, and a state for checkpoints.

*Contract*: a run calls `prepare` once, after it has built model and optimizer and before it wraps the model (in DDP).
Then the one step body (`engine.supervised`) calls `forward` around the model and the loss, `backward` once for each
microbatch, and `update` once, when all gradients of the update have met. A precision never gets the data or the ranks.
`update` returns whether the optimizer stepped. A gradient scaler that found an overflow skips exactly that update, and
so does a `before_step` that returns False.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

BeforeStep = Callable[[], bool | None]
"""A function that is called when the gradients are reduced and unscaled, to clip or measure them. False: no update."""


@runtime_checkable
class Precision(Protocol):
    """The methods of a precision that the step body calls."""

    name: str

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return model and optimizer in the form that this precision needs: the same two objects, changed or not."""

    def forward(self) -> AbstractContextManager[Any]:
        """Return the context in which the model and the loss are computed."""

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Accumulate the gradients of `loss`, a scalar, into the parameters' `.grad`."""

    def update(self, optimizer: torch.optim.Optimizer, before_step: BeforeStep | None = None) -> bool:
        """Unscale the gradients, call `before_step`, step the optimizer; return whether it stepped."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint must hold; empty if there is none."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""


_NO_CONTEXT = nullcontext()


class FP32:
    """Full precision: plain forward, plain backward, plain step."""

    name = "fp32"

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        return model, optimizer

    def forward(self) -> AbstractContextManager[Any]:
        return _NO_CONTEXT

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        torch.autograd.backward(loss)

    def update(self, optimizer: torch.optim.Optimizer, before_step: BeforeStep | None = None) -> bool:
        if before_step is not None and before_step() is False:
            return False
        optimizer.step()
        return True

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return None
