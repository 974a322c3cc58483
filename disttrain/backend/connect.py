"""Chooses the backend of this process and connects it.

*Contract*: this is the only module that knows all backends.
"""

import math

import torch

from disttrain.backend.base import Backend
from disttrain.backend.native import NativeBackend, choose_device
from disttrain.backend.single import SingleBackend
from disttrain.backend.xla import connect_xla
from disttrain.backend.xla_spmd import connect_spmd
from disttrain.devices import backend_names, device_row, has_torch_xla, process_groups
from disttrain.environment import Launch, Topology, pjrt_device, read_launch
from disttrain.errors import BackendError, ConfigError


def connect(
    name: str = "auto", *, timeout_s: float = 300.0, device: str | torch.device | None = None, spmd: bool | None = False
) -> Backend:
    """Connect this process to the other ranks of its run and return its backend.

    `name="auto"` is xla if PJRT_DEVICE=TPU is set and torch_xla is installed. Otherwise it is `single` without a
    launcher; under a launcher it is the accelerator's backend (nccl for CUDA), or gloo on CPUs. "gloo" and "nccl"
    without a launcher are a world of one. `timeout_s` is the longest absence of a rank from a collective and from the
    start. `device` overrides the default, which is the accelerator if the backend runs on one. With `spmd=True` one
    rank drives all XLA devices as one; `spmd=None` does so if the backend is xla.

    The backend has `rank`, `world_size`, `device`, `process_group` and collectives; see `Backend`. Close it by
    `close()`, or use it as a context manager, which also reports an exception to the other ranks.

    *Errors*: ConfigError for an impossible name, device or timeout. BackendError for a launcher's variables that
    contradict each other, for a missing accelerator, and for ranks that do not connect within `timeout_s`.

    *Cost*: none for one rank. Several ranks cost the rendezvous, below a second on one host, one sleeping thread and,
    beside an accelerator's group, a gloo group for numbers and objects.
    """
    if name not in backend_names():
        raise ConfigError(f"expected backend to be one of {', '.join(backend_names())}, got {name!r}")
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise ConfigError(f"expected timeout_s to be a positive number of seconds, got {timeout_s!r}")
    launch = read_launch()
    asked = torch.device(device) if device is not None else None
    if name == "auto" and asked is None and pjrt_device() == "TPU" and has_torch_xla():
        name = "xla"
    if name == "xla":
        if asked is not None and asked.type != "xla":
            raise ConfigError(f"expected an xla device for backend='xla', got device={str(asked)!r}; leave device out")
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
    device_type = next(kind for kind, group in process_groups().items() if group == name)
    if device_type != "cpu" and (accelerator is None or accelerator.type != device_type):
        raise BackendError(
            f"backend={name!r} expected a {device_type} device, got {accelerator or 'none'}; "
            "use backend='gloo' on CPUs, or install a torch build and a driver for the device"
        )
    if asked is not None and asked.type != device_type:
        raise ConfigError(
            f"expected a {device_type} device for backend={name!r}, got device={str(asked)!r}; leave device out"
        )
    if asked is None or asked.index is None:
        num_devices = 0 if device_type == "cpu" else torch.accelerator.device_count()
        asked = choose_device(device_type, num_devices, launch.topology if launch is not None else Topology())
    return NativeBackend(launch, asked, timeout_s)


def choose_name(launch: Launch | None, device: torch.device | None) -> str:
    """Return the backend that "auto" means for a process of this launch on this device (None: the CPU)."""
    if launch is None:
        return "single"
    return process_groups().get(device.type, "gloo") if device is not None else "gloo"


def _single(launch: Launch | None, device: torch.device) -> SingleBackend:
    if launch is not None and launch.topology.world_size > 1:
        raise BackendError(
            f"expected one process for backend='single', got {launch.topology.world_size} ranks from "
            f"{launch.launcher}, each of which would do the whole run; use backend='auto', or start one process"
        )
    if device.index is None and device_row(device).has_index:
        device = torch.device(device.type, 0)
    return SingleBackend(device, launch.restarts if launch is not None else 0)
