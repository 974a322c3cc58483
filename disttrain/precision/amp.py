"""Mixed precision by `torch.amp`: bfloat16 alone, float16 with a gradient scaler; CPU, CUDA and XLA.

*Contract*: the model and the loss run under `torch.autocast`; parameters, gradients and the optimizer stay in
float32. With a scaler the gradients are unscaled before `before_step` sees them. An update whose gradients
overflowed is skipped: `before_step` is still called (its norm is then inf or nan), the scale shrinks,
`update` returns False and `num_skipped` grows by one. A `before_step` that returns False skips the optimizer
but not the scaler, whose scale follows the gradients it saw.

*Cost*: with a scaler, two fetches of the scale an update, to know on the host whether the optimizer stepped.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from disttrain.precision.base import FP32, BeforeStep


class AMP(FP32):
    """Autocast to `dtype` on devices of `device_type`; gradients scaled where there is a `scaler`.

    `scaler` is a GradScaler, or True for a new one. `dtype` None means float16 with a scaler, and what
    `torch.autocast` takes by itself without one (CUDA: float16, others: bfloat16).
    """

    def __init__(
        self, device_type: str, dtype: torch.dtype | None = None, scaler: GradScaler | bool | None = None
    ) -> None:
        if not torch.amp.is_autocast_available(device_type):
            raise ValueError(f"expected a device type that torch.autocast knows, got {device_type!r}; use fp32 there")
        if scaler is True:
            scaler = GradScaler(device_type)
        self.scaler: GradScaler | None = scaler or None
        """The gradient scaler; None where the gradients are not scaled."""
        self.num_skipped = 0
        """How many updates the scaler skipped because their gradients overflowed."""
        self._device_type = device_type
        self._dtype = dtype or (torch.float16 if self.scaler else torch.get_autocast_dtype(device_type))
        if self._dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"expected dtype torch.float16 or torch.bfloat16, got {dtype}; for float32 use no autocast"
            )
        self.name = "fp16" if self._dtype is torch.float16 else "bf16"

    def forward(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device_type, self._dtype)

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def update(self, optimizer: torch.optim.Optimizer, before_step: BeforeStep | None = None) -> bool:
        if self.scaler is None:
            return super().update(optimizer, before_step)
        scale = self.scaler.get_scale()
        wanted = True
        if before_step is not None:
            self.scaler.unscale_(optimizer)
            wanted = before_step() is not False
        if wanted:
            self.scaler.step(optimizer)
        self.scaler.update()
        overflowed = self.scaler.get_scale() < scale  # the scaler says it in no other public way
        self.num_skipped += overflowed
        return wanted and not overflowed

    def state_dict(self) -> dict[str, Any]:
        if self.scaler is None:
            return {}
        return {"scaler": self.scaler.state_dict(), "num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; the empty state of a run without a scaler leaves ours new."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state["scaler"])
            self.num_skipped = int(state["num_skipped"])
