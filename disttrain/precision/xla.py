"""Float32, or bfloat16 by autocast, on XLA devices such as TPUs; torch_xla does the step of the optimizer.

*Contract*: nothing here waits for the device. `update` sends the recorded operations to the device. If the gradients
have not met yet (`reduces`), it first averages them over the replicas, as `xm.optimizer_step(barrier=True)` does, and
then calls `before_step`. On TPUs, matrix products of float32 are computed in float32; this is not their default.

*Errors*: ModuleNotFoundError with the package to install if torch_xla is missing. ValueError for float16, because there
is no gradient scaler for these devices.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from disttrain.devices import INSTALL_TORCH_XLA, has_torch_xla
from disttrain.precision.base import FP32, BeforeStep


class XLA(FP32):
    """Plain forward, or autocast to `dtype` torch.bfloat16; plain backward; torch_xla's step of the optimizer.

    `reduces=False`: the gradients have met before `update` is called, and are the same on every replica.
    """

    def __init__(self, dtype: torch.dtype | None = None, *, reduces: bool = True) -> None:
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"expected dtype None or torch.bfloat16 on an xla device, got {dtype}")
        if not has_torch_xla():
            raise ModuleNotFoundError(
                f"expected torch_xla, which is not installed; {INSTALL_TORCH_XLA}", name="torch_xla"
            )
        import torch_xla
        import torch_xla.core.xla_model as xm

        self._torch_xla, self._xla_model = torch_xla, xm
        self._reduces = reduces
        self._dtype = dtype
        self.name = "fp32" if dtype is None else "bf16"

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        # torch_xla's public function for this logs a warning each time.
        self._torch_xla._XLAC._xla_set_mat_mul_precision("highest")
        return model, optimizer

    def forward(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._dtype is None else torch.autocast("xla", self._dtype)

    def update(self, optimizer: torch.optim.Optimizer, before_step: BeforeStep | None = None) -> bool:
        if self._reduces and before_step is None:
            self._xla_model.optimizer_step(optimizer, barrier=True)
            return True
        if self._reduces:
            self._xla_model.reduce_gradients(optimizer)
        wanted = before_step is None or before_step() is not False
        if wanted:
            optimizer.step()
        self._torch_xla.sync()
        return wanted
