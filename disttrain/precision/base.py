"""In what numbers a step computes: three methods, what comes before them, and the state that a checkpoint needs.

*Contract*: the recipe calls `prepare` once, when model and optimizer are built and before the model is wrapped (in
DDP). Then the one step body (`engine.supervised`) calls `forward` around the model and the loss, `backward` once for
each microbatch, and `update` once when all the gradients of the update have met. A precision never sees the data or
the ranks. `update` returns whether the optimizer stepped: a gradient scaler that found an overflow, or a
`before_step` that says no, skips exactly that update.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

BeforeStep = Callable[[], bool | None]
"""Called with the gradients reduced and unscaled: clips, measures. Returning False skips the update."""


@runtime_checkable
class Precision(Protocol):
    """What the step body needs of a precision."""

    name: str

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return model and optimizer as this precision wants them: the same two, changed or not."""

    def forward(self) -> AbstractContextManager[Any]:
        """Return the context in which the model and the loss are computed."""

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Accumulate the gradients of `loss`, a scalar, into the parameters' `.grad`."""

    def update(self, optimizer: torch.optim.Optimizer, before_step: BeforeStep | None = None) -> bool:
        """Unscale the gradients, call `before_step`, step the optimizer; return whether it stepped."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold; empty where there is nothing."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""


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
