"""The table of device types, with one row each: another accelerator is another row.

*Contract*: every room that treats device types differently reads this table. A device type without a row gets `OTHER`:
it trains in one process, in fp32 and bf16. The code names a device type beside its row only where a row cannot help:
"cpu" for memory of the host, and "xla" for code that calls torch_xla; tests/test_devices.py has the list.

*Cost*: none. This module imports no torch and no optional package, and starts no device.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # only for types: to read a config needs this table, and must not import torch

INSTALL_TORCH_XLA = "pip install torch==2.9.0 torch_xla==2.9.0 (its newest release needs that torch)"


@dataclass(frozen=True)
class DeviceType:
    """One row of the table: the abilities of a type of device."""

    process_group: str | None = None
    """The backend of torch.distributed that connects several ranks, and its name in a Config; None: there is none."""
    precisions: tuple[str, ...] = ("fp32", "bf16")
    """The precisions that work on it, without "auto"."""
    auto_precision: str | None = None
    """The precision that "auto" means; None: bf16 if `is_bf16_supported` of its torch module is true, else fp32."""
    has_index: bool = True
    """A host may have several of it, so one process takes number 0."""
    copies_ahead: bool = False
    """It copies a batch from pinned host memory on a second stream, while the first stream computes."""
    pins_checkpoints: bool = False
    """A checkpoint is copied to pinned host memory, without a wait for each tensor."""
    views_bytes: bool = True
    """A tensor's view as bytes is free; without this it would be copied to the host and back."""
    hashes: bool = False
    """`torch.hash_tensor` runs on it; without this a tensor is copied to the host for its hash."""
    counts_memory: bool = False
    """torch.accelerator tells the bytes of its tensors, now and at most, and those of the device."""
    autocasts: bool = True
    """`torch.autocast` supports it, for the factories' `amp_mode`."""
    is_lazy: bool = False
    """It collects operations into programs. Parts of a run that were never tried with that are refused."""


DEVICE_TYPES = {
    "cpu": DeviceType("gloo", ("fp32", "bf16", "fp16"), "fp32", has_index=False, hashes=True),
    "cuda": DeviceType(
        "nccl",
        ("fp32", "bf16", "fp16", "apex"),
        copies_ahead=True,
        pins_checkpoints=True,
        hashes=True,
        counts_memory=True,
    ),
    "xpu": DeviceType(copies_ahead=True, counts_memory=True),
    "xla": DeviceType(auto_precision="bf16", views_bytes=False, autocasts=False, is_lazy=True),
    "mps": DeviceType(precisions=("fp32",), has_index=False, autocasts=False),
}
OTHER = DeviceType()


def device_row(device: "torch.device | str") -> DeviceType:
    """Return the row of a device such as "cuda:0"."""
    return DEVICE_TYPES.get(str(device).partition(":")[0], OTHER)


def process_groups() -> dict[str, str]:
    """Return the backends that connect ranks, by device type."""
    return {kind: row.process_group for kind, row in DEVICE_TYPES.items() if row.process_group is not None}


def backend_names() -> tuple[str, ...]:
    """Return the names that `connect` and the Config's field `backend` accept."""
    return ("auto", *process_groups().values(), "single", "xla")


def has_torch_xla() -> bool:
    """Return whether torch_xla is installed; an import of it would start its runtime."""
    return find_spec("torch_xla") is not None
