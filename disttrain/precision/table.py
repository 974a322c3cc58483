"""Builds the precision that a config names, if it works on the device; `devices.py` has the rows of this table.

| device    | fp32 | bf16 | fp16          | apex | auto                                     |
|-----------|------|------|---------------|------|------------------------------------------|
| cpu       | yes  | yes  | yes, scaled   | no   | fp32: see below                          |
| cuda      | yes  | yes  | yes, scaled   | yes  | bf16 where the GPU has it, else fp32     |
| xla       | yes  | yes  | no            | no   | bf16                                     |
| mps       | yes  | no   | no            | no   | fp32                                     |
| any other | yes  | yes  | no            | no   | bf16 where the device has it, else fp32  |

On a CPU "auto" is fp32. Most CPUs compute bfloat16 by converting it, which is slower, and a run would have other bits
on a CPU that does not convert. docs/devices.md says how each pair was tested.

*Errors*: ConfigError before the model is built, with the precisions that work instead.
"""

from collections.abc import Callable

import torch

from disttrain.devices import device_row
from disttrain.errors import ConfigError
from disttrain.precision.amp import AMP
from disttrain.precision.apex import Apex
from disttrain.precision.base import FP32, Precision
from disttrain.precision.xla import XLA


def choose_precision(name: str | Callable[[torch.device], Precision], device: torch.device | str) -> Precision:
    """Return the precision of that `name` for `device`; a function in place of a name is called with the device."""
    device = torch.device(device)
    if not isinstance(name, str):
        return _from_factory(name, device)
    kind = device.type
    if name == "auto":
        name = _best(device)
    works = device_row(device).precisions
    if name not in works:
        expected = " or ".join((*works, "auto"))
        raise ConfigError(f"precision={name!r} does not work on a device of type {kind!r}; use {expected}")
    try:
        return _build(name, kind)
    except ModuleNotFoundError as error:
        raise ConfigError(f"precision={name!r}: {error}") from error


def _from_factory(factory: Callable[[torch.device], Precision], device: torch.device) -> Precision:
    precision = factory(device)
    if not isinstance(precision, Precision) or isinstance(precision, type):
        raise ConfigError(
            f"precision: expected a function that returns an object with prepare, forward, backward, update, "
            f"state_dict and load_state_dict, got {precision!r} from {factory!r}; begin with a subclass of FP32"
        )
    return precision


def _build(name: str, kind: str) -> Precision:
    if name == "apex":
        return Apex(unscale_at_update=True)  # the gradients of slots and ranks meet after their backwards
    if kind == "xla":
        return XLA(torch.bfloat16 if name == "bf16" else None, reduces=False)  # gradients meet before the update
    if name == "fp32":
        return FP32()
    if name == "bf16":
        return AMP(kind, torch.bfloat16)
    return AMP(kind, torch.float16, scaler=True)


def _best(device: torch.device) -> str:
    row = device_row(device)
    if row.auto_precision is not None or "bf16" not in row.precisions:
        return row.auto_precision or "fp32"
    is_supported = getattr(torch.get_device_module(device.type), "is_bf16_supported", lambda **_: False)
    return "bf16" if is_supported(including_emulation=False) else "fp32"
