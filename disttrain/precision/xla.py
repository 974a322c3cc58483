"""The numbers of an XLA device, TPUs first: float32, or bfloat16 by autocast; the step by torch_xla.

*Contract*: nothing here waits for the device but `update`, whose `xm.optimizer_step(barrier=True)` averages the
gradients over the replicas, steps and has the traced graph executed.

*Errors*: ModuleNotFoundError with what to install where torch_xla is absent; ValueError for float16, for which
there is no scaler on these devices.
"""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch

from disttrain.precision.base import FP32, BeforeStep

INSTALL = "pip install torch==2.9.0 torch_xla==2.9.0 (its newest release needs that torch)"


def has_torch_xla() -> bool:
    """Return whether torch_xla is installed, without importing it, which would start its runtime."""
    return find_spec("torch_xla") is not None


class XLA(FP32):
    """Plain forward, or autocast to `dtype` torch.bfloat16; plain backward; torch_xla's optimizer step."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"expected dtype None or torch.bfloat16 on an xla device, got {dtype}")
        if not has_torch_xla():
            raise ModuleNotFoundError(f"expected torch_xla, which is not installed; {INSTALL}", name="torch_xla")
        import torch_xla.core.xla_model as xm

        self._optimizer_step = xm.optimizer_step
        self._dtype = dtype
        self.name = "fp32" if dtype is None else "bf16"

    def forward(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._dtype is None else torch.autocast("xla", self._dtype)

    def update(self, optimizer: torch.optim.Optimizer, before_step: BeforeStep | None = None) -> bool:
        if before_step is not None and before_step() is False:
            return False
        self._optimizer_step(optimizer, barrier=True)
        return True
