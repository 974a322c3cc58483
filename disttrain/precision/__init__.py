"""IN WHAT numbers a step computes: four small objects with the same few methods, and the table of devices.

A fifth precision is one class that obeys `Precision`, given to a Config as it is (docs/precision.md); with a name of
its own it is also a row in `table.py`.
"""

from disttrain.precision.amp import AMP
from disttrain.precision.apex import Apex
from disttrain.precision.base import FP32, BeforeStep, Precision
from disttrain.precision.table import choose
from disttrain.precision.xla import XLA

__all__ = ["AMP", "FP32", "XLA", "Apex", "BeforeStep", "Precision", "choose"]
