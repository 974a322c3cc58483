"""XLA's SPMD mode: one process, which is one rank, drives all devices as one.

*Contract*: the world has one rank, and its `num_devices` are the runtime's devices. `parallel/spmd_layout.py` spreads
tensors over them. A process that has entered this mode stays in it.

*Errors*: BackendError for several processes, and for a runtime that has started without the mode.

*Source*: torch_xla 2.9's `runtime.use_spmd`.
"""

from disttrain.backend.single import SingleBackend
from disttrain.backend.xla import CPU, XlaBackend, import_torch_xla
from disttrain.environment import Launch, set_default
from disttrain.errors import BackendError


def connect_spmd(launch: Launch | None) -> "SpmdBackend":
    """Switch this process's XLA runtime to SPMD mode and return the backend of its one rank."""
    set_default("TF_CPP_MIN_LOG_LEVEL", "2")  # else each compilation warns that its partitioner will be replaced
    import_torch_xla()
    from torch_xla import _XLAC, runtime

    if launch is not None and launch.topology.world_size > 1:
        raise BackendError(
            f"expected one process, which drives all XLA devices in SPMD mode, got {launch.topology.world_size} from "
            f"{launch.launcher} (PJRT_DEVICE={runtime.device_type()}); start python -m disttrain.launch, or leave out "
            "spmd=true and strategy='fsdp': then each device is a rank, on any number of hosts"
        )
    if not runtime.is_spmd():
        if _XLAC._xla_get_spmd_config_is_locked():
            raise BackendError(
                "expected an XLA runtime that has not started, got one without SPMD mode; connect in a new process, "
                "before any tensor is on an XLA device"
            )
        runtime.use_spmd()
    if runtime.process_count() > 1:
        raise BackendError(
            f"expected one process, which drives all XLA devices in SPMD mode, got {runtime.process_count()} in the "
            "XLA runtime; use one host, or leave out spmd=true and strategy='fsdp' and start with torchrun, one "
            "process a chip"
        )
    restarts = launch.restarts if launch is not None else 0
    return SpmdBackend(SingleBackend(CPU, restarts), runtime.global_runtime_device_count())


class SpmdBackend(XlaBackend):
    """All XLA devices of a host as the one device of one rank."""

    def __init__(self, control: SingleBackend, num_devices: int) -> None:
        super().__init__(control)
        self.num_devices = num_devices
