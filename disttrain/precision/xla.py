"""The numbers of an XLA device, TPUs first: float32, or bfloat16 by autocast; the step by torch_xla.

*Contract*: nothing here waits for the device; `update` sends it what was recorded. Where the gradients have not met yet
(`reduces`) it first averages them over the replicas, as `xm.optimizer_step(barrier=True)` does, and then asks
`before_step`. On TPUs matrix products of float32 are computed in float32, which they are not by default.

*Errors*: ModuleNotFoundError with what to install where torch_xla is absent; ValueError for float16, for which
there is no scaler on these devices.
"""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from disttrain.precision.base import FP32, BeforeStep

INSTALL = "pip install torch==2.9.0 torch_xla==2.9.0 (its newest release needs that torch)"


def has_torch_xla() -> bool:
    """Return whether torch_xla is installed, without importing it, which would start its runtime."""
    return find_spec("torch_xla") is not None


class XLA(FP32):
    """Plain forward, or autocast to `dtype` torch.bfloat16; plain backward; torch_xla's optimizer step.

    `reduces=False`: the gradients have met, the same on every replica, when `update` is called.
    """

    def __init__(self, dtype: torch.dtype | None = None, *, reduces: bool = True) -> None:
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"expected dtype None or torch.bfloat16 on an xla device, got {dtype}")
        if not has_torch_xla():
            raise ModuleNotFoundError(f"expected torch_xla, which is not installed; {INSTALL}", name="torch_xla")
        import torch_xla
        import torch_xla.core.xla_model as xm

        self._torch_xla, self._xla_model = torch_xla, xm
        self._reduces = reduces
        self._dtype = dtype
        self.name = "fp32" if dtype is None else "bf16"

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        # The public function for it logs a warning each time.
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
