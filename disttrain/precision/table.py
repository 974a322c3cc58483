"""Which precision works on which device: the one table, asked before a model is built.

| device    | fp32 | bf16 | fp16          | apex | auto                                     |
|-----------|------|------|---------------|------|------------------------------------------|
| cpu       | yes  | yes  | yes, scaled   | no   | fp32: see below                          |
| cuda      | yes  | yes  | yes, scaled   | yes  | bf16 where the GPU has it, else fp32     |
| xla       | yes  | yes  | no            | no   | bf16                                     |
| mps       | yes  | no   | no            | no   | fp32                                     |
| any other | yes  | yes  | no            | no   | bf16 where the device has it, else fp32  |

On a CPU "auto" is fp32: most compute bfloat16 by converting, at a loss, and a run would have other bits on a CPU that
does not. docs/devices.md says how each pair was tested.

*Errors*: ConfigError with what would work instead.
"""

from collections.abc import Callable

import torch

from disttrain.errors import ConfigError
from disttrain.precision.amp import AMP
from disttrain.precision.apex import Apex
from disttrain.precision.base import FP32, Precision
from disttrain.precision.xla import XLA

NAMES = ("fp32", "bf16", "fp16", "apex", "auto")
WORKS = {
    "cpu": ("fp32", "bf16", "fp16"),
    "cuda": ("fp32", "bf16", "fp16", "apex"),
    "xla": ("fp32", "bf16"),
    "mps": ("fp32",),
}
ANY_OTHER = ("fp32", "bf16")


def choose(name: str | Callable[[torch.device], Precision], device: torch.device | str) -> Precision:
    """Return the precision that a config calls `name`, for `device`; one of its own is made by calling it."""
    device = torch.device(device)
    if not isinstance(name, str):
        return _own(name, device)
    kind = device.type
    if name == "auto":
        name = _best(kind)
    works = WORKS.get(kind, ANY_OTHER)
    if name not in works:
        expected = " or ".join((*works, "auto"))
        raise ConfigError(f"precision={name!r} does not work on a device of type {kind!r}; use {expected}")
    try:
        return _build(name, kind)
    except ModuleNotFoundError as error:
        raise ConfigError(f"precision={name!r}: {error}") from error


def _own(factory: Callable[[torch.device], Precision], device: torch.device) -> Precision:
    made = factory(device)
    if not isinstance(made, Precision) or isinstance(made, type):
        raise ConfigError(
            f"precision: expected a function that returns an object with prepare, forward, backward, update, "
            f"state_dict and load_state_dict, got {made!r} from {factory!r}; begin with a subclass of FP32"
        )
    return made


def _build(name: str, kind: str) -> Precision:
    if name == "apex":
        return Apex(unscale_at_update=True)  # slots and ranks: gradients meet after their backwards
    if kind == "xla":
        return XLA(torch.bfloat16 if name == "bf16" else None, reduces=False)  # slots meet before the update
    if name == "fp32":
        return FP32()
    if name == "bf16":
        return AMP(kind, torch.bfloat16)
    return AMP(kind, torch.float16, scaler=True)


def _best(kind: str) -> str:
    if "bf16" not in WORKS.get(kind, ANY_OTHER) or kind == "cpu":
        return "fp32"
    if kind == "xla":
        return "bf16"
    has_it = getattr(torch.get_device_module(kind), "is_bf16_supported", lambda **_: False)
    return "bf16" if has_it(including_emulation=False) else "fp32"
