"""Mixed precision by `torch.amp` on CPU, CUDA and XLA: bfloat16, or float16 with a gradient scaler.

*Contract*: the model and the loss run under `torch.autocast`. Parameters, gradients and the optimizer stay in float32.
With a scaler, the gradients are unscaled before `before_step` is called. An update with gradients that overflowed is
skipped: `before_step` is still called (its norm is then inf or nan), the scale shrinks, `update` returns False, and
`num_skipped` grows by one. If `before_step` returns False, the optimizer is skipped, but the scaler is updated: its
scale follows the gradients that it has unscaled.

*Cost*: with a scaler, each update fetches the scale twice, so the host knows whether the optimizer stepped.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from disttrain.precision.base import FP32, BeforeStep


class AMP(FP32):
    """Autocast to `dtype` on devices of `device_type`; with a `scaler` the gradients are scaled.

    `scaler` is a GradScaler, or True for a new one. `dtype` None means float16 with a scaler. Without a scaler it means
    the default of `torch.autocast`: float16 on CUDA, bfloat16 elsewhere.
    """

    def __init__(
        self, device_type: str, dtype: torch.dtype | None = None, scaler: GradScaler | bool | None = None
    ) -> None:
        if not torch.amp.is_autocast_available(device_type):
            raise ValueError(f"expected a device type that torch.autocast knows, got {device_type!r}; use fp32 there")
        if scaler is True:
            scaler = GradScaler(device_type)
        self.scaler: GradScaler | None = scaler or None
        """The gradient scaler; None if the gradients are not scaled."""
        self.num_skipped = 0
        """The number of updates that the scaler has skipped because their gradients overflowed."""
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
        overflowed = self.scaler.get_scale() < scale  # there is no other public sign of it
        self.num_skipped += overflowed
        return wanted and not overflowed

    def state_dict(self) -> dict[str, Any]:
        if self.scaler is None:
            return {}
        return {"scaler": self.scaler.state_dict(), "num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned; an empty state, of a run without a scaler, changes nothing."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state["scaler"])
            self.num_skipped = int(state["num_skipped"])
