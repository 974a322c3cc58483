"""Choosing a backend and connecting it; the only place that knows them all."""

import math

import torch

from disttrain.backend.base import Backend, Place
from disttrain.backend.environment import Launch, pjrt_device, read_launch
from disttrain.backend.native import GROUPS, NativeBackend, choose_device
from disttrain.backend.single import SingleBackend
from disttrain.backend.spmd import connect_spmd
from disttrain.backend.xla import connect_xla, has_torch_xla
from disttrain.errors import BackendError, ConfigError

NAMES = ("auto", *GROUPS.values(), "single", "xla")


def connect(
    name: str = "auto", *, timeout_s: float = 300.0, device: str | torch.device | None = None, spmd: bool | None = False
) -> Backend:
    """Connect this process to the other ranks of its run and return its backend.

    "auto": xla where PJRT_DEVICE=TPU is set and torch_xla is there; else under a launcher nccl where CUDA is there and
    gloo where not; `single` without a launcher. "gloo" and
    "nccl" without a launcher are a world of one. `timeout_s` is the longest silence of a rank in a collective, at
    the start too. `device` overrides the choice: an accelerator where there is one and the backend runs there. `spmd`:
    one rank drives all XLA devices as one; None: where the backend is xla.

    What comes back is closed by `close()` or as a context manager, which also tells the other ranks of an exception.
    It has `rank`, `world_size`, `device`, `process_group` and collectives; see `Backend`.
    *Errors*: ConfigError for a name, device or timeout that cannot be; BackendError for a launcher's variables that do
    not fit together, a missing accelerator, and ranks that do not meet within `timeout_s`.
    *Cost*: one rank: none. Several: the meeting, below a second on one host, one sleeping thread and, beside an
    accelerator's group, a gloo group for numbers and objects.
    """
    if name not in NAMES:
        raise ConfigError(f"expected backend to be one of {', '.join(NAMES)}, got {name!r}")
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise ConfigError(f"expected timeout_s to be a positive number of seconds, got {timeout_s!r}")
    launch = read_launch()
    asked = torch.device(device) if device is not None else None
    if name == "auto" and asked is None and pjrt_device() == "TPU" and has_torch_xla():
        name = "xla"
    if name == "xla":
        if asked is not None and asked.type != "xla":
            raise ConfigError(f"backend='xla' runs on 'xla', got device={str(asked)!r}; leave device out")
        return connect_xla(launch, timeout_s) if spmd is False else connect_spmd(launch)
    if spmd:
        raise ConfigError(
            f"spmd=True expected XLA devices, got backend={name!r}; leave spmd out, or use backend='xla' where "
            "torch_xla is installed"
        )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        name = choose_name(launch, asked or accelerator)
    if name == "single":
        return _single(launch, asked or accelerator or torch.device("cpu"))
    device_type = next(kind for kind, group in GROUPS.items() if group == name)
    if device_type != "cpu" and (accelerator is None or accelerator.type != device_type):
        raise BackendError(
            f"backend={name!r} expected a {device_type} device, got {accelerator or 'none'}; "
            "use backend='gloo' on CPUs, or install a torch build and a driver for the device"
        )
    if asked is not None and asked.type != device_type:
        raise ConfigError(f"backend={name!r} runs on {device_type!r}, got device={str(asked)!r}; leave device out")
    if asked is None or asked.index is None:
        num_devices = 0 if device_type == "cpu" else torch.accelerator.device_count()
        asked = choose_device(device_type, num_devices, launch.place if launch is not None else Place())
    return NativeBackend(launch, asked, timeout_s)


def choose_name(launch: Launch | None, device: torch.device | None) -> str:
    """Return what "auto" means for a process of this launch on this device (None: the CPU)."""
    if launch is None:
        return "single"
    return GROUPS.get(device.type, "gloo") if device is not None else "gloo"


def _single(launch: Launch | None, device: torch.device) -> SingleBackend:
    if launch is not None and launch.place.world_size > 1:
        raise BackendError(
            f"backend='single' is one process, got {launch.place.world_size} ranks from {launch.launcher}, "
            "each of which would do the whole run; use backend='auto', or start one process"
        )
    if device.index is None and device.type not in ("cpu", "mps"):
        device = torch.device(device.type, 0)
    return SingleBackend(device, launch.restarts if launch is not None else 0)
