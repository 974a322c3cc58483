"""IN WHAT numbers a step computes: small objects with the same few methods.

    base   the protocol `Precision`, and FP32: plain float32
    amp    bfloat16, or float16 with a gradient scaler, by torch.amp
    apex   mixed precision by NVIDIA apex, for programs that were written for it
    xla    float32 or bfloat16 on XLA devices
    table  builds the precision that a config names, for a device

| noun      | meaning                                                                           |
|-----------|-----------------------------------------------------------------------------------|
| precision | the numbers of a step, as an object: prepare, forward, backward, update, a state  |
| update    | one step of the optimizer, after the gradients of all microbatches have met       |
| overflow  | scaled gradients that are not finite; exactly that update is skipped              |
| scaler    | multiplies a loss before its backward, and divides the gradients before an update |

A fifth precision is one class that obeys `Precision`. A Config takes it as it is (docs/precision.md).
"""

from disttrain.precision.amp import AMP
from disttrain.precision.apex import Apex
from disttrain.precision.base import FP32, BeforeStep, Precision
from disttrain.precision.table import choose_precision
from disttrain.precision.xla import XLA

__all__ = ["AMP", "FP32", "XLA", "Apex", "BeforeStep", "Precision", "choose_precision"]
