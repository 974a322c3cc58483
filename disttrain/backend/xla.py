"""Ranks that are XLA devices, TPU chips above all: one in each process of torchrun, or threads of one process.

*Contract*: headers, numbers, objects and CPU tensors pass through the host, by gloo between processes and by shared
memory between threads, so they compile nothing. XLA gathers tensors that are on the device. It compiles each new shape
once, and everything that is recorded runs before the result is read. `parallel/xla_gradients.py` reduces gradients
without a process group, so `process_group` is None.

*Errors*: BackendError if torch_xla is absent, or if the XLA runtime connects other replicas than the launcher started.
Its CPU device has one replica a process, and reports rank 0 of 1 in each process without an error.

*Cost*: as in `base.py`; the broadcast of a tensor on the device costs as much as its gather.

*Source*: torch_xla 2.9's `_internal/rendezvous.py`, for how torchrun's processes become replicas.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from disttrain.backend.base import Programs
from disttrain.backend.checked import CheckedBackend
from disttrain.backend.native import NativeBackend
from disttrain.backend.single import SingleBackend
from disttrain.backend.threads import ThreadsBackend
from disttrain.devices import INSTALL_TORCH_XLA, has_torch_xla
from disttrain.environment import Launch
from disttrain.errors import BackendError, ConfigError

ModuleT = TypeVar("ModuleT", bound=nn.Module)

CPU = torch.device("cpu")


def import_torch_xla() -> None:
    """Import torch_xla without its handler for log messages; BackendError if it is absent."""
    if not has_torch_xla():
        raise BackendError(
            f"backend='xla' expected torch_xla, which is not installed; {INSTALL_TORCH_XLA}, or use another backend"
        )
    handlers = list(logging.getLogger().handlers)
    import torch_xla.runtime  # noqa: F401

    for added in [handler for handler in logging.getLogger().handlers if handler not in handlers]:
        logging.getLogger().removeHandler(added)  # its import adds a handler that would print everyone's messages


def connect_xla(launch: Launch | None, timeout_s: float) -> "XlaBackend":
    """Return the backend of this process, or of this thread if replicas are threads."""
    import_torch_xla()
    from torch_xla import _XLAC, runtime
    from torch_xla._internal import pjrt

    if runtime.is_spmd():
        raise BackendError(
            "expected an XLA runtime with a replica for each device, got one in SPMD mode, which a process cannot "
            "leave; connect with spmd=true, or unset XLA_USE_SPMD and connect in a new process"
        )
    if launch is not None and launch.topology.world_size > 1:
        pjrt.initialize_multiprocess(launch.topology.local_rank, launch.topology.local_world_size)
        check_world_size(launch, runtime.world_size(), runtime.device_type())
        topology = replace(launch.topology, rank=runtime.global_ordinal())
        return XlaBackend(NativeBackend(replace(launch, topology=topology), CPU, timeout_s))
    restarts = launch.restarts if launch is not None else 0
    if not _XLAC._xla_get_replication_devices_count():
        pjrt.initialize_singleprocess()
    if runtime.world_size() == 1:
        return XlaBackend(SingleBackend(CPU, restarts))
    if runtime.process_count() > 1:
        raise BackendError(
            f"expected torchrun's variables in each of {runtime.process_count()} processes, got none; start with "
            "torchrun, one process a chip: ranks need a connection beside the device"
        )
    return XlaBackend(ThreadsBackend(runtime.global_ordinal(), runtime.world_size(), timeout_s))


def check_world_size(launch: Launch, num_replicas: int, device_type: str | None) -> None:
    """Raise BackendError unless the XLA runtime has as many replicas as the launcher has ranks."""
    expected = launch.topology.world_size
    if num_replicas == expected:
        return
    if device_type == "CPU":
        reason = (
            "torch_xla's CPU device does not connect processes, each would train alone as rank 0 of 1; "
            "start one process (python -m disttrain.launch), or use backend='gloo'"
        )
    else:
        reason = "start one process for each device: --nproc-per-node is the number of chips of a host"
    raise BackendError(
        f"expected {expected} replicas, as {launch.launcher} started, got {num_replicas} from the XLA runtime "
        f"(PJRT_DEVICE={device_type}): {reason}"
    )


class XlaBackend(CheckedBackend):
    """One XLA device; `control` is the backend of the same ranks on their hosts' CPUs."""

    name = "xla"

    def __init__(self, control: CheckedBackend) -> None:
        import torch_xla

        self.device = torch_xla.device()
        self.topology = control.topology
        self.restarts = control.restarts
        self._control = control
        self._board = control._board

    @property
    def process_group(self) -> None:
        if self._closed:
            raise BackendError("expected an open backend for process_group, got a closed one; call connect() again")

    @property
    def metrics_device(self) -> torch.device:
        return CPU

    def move(self, module: ModuleT) -> ModuleT:
        """Return the module on the device and tie its tied parameters again: XLA gives each name a new tensor."""
        names_by_id: dict[int, list[tuple[nn.Module, str]]] = {}
        for owner in module.modules():
            for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
                names_by_id.setdefault(id(tensor), []).append((owner, name))
        originals = list(module.parameters()), list(module.buffers())  # while they live no other tensor gets an id
        module = module.to(self.device)
        for first, *others in names_by_id.values():
            for owner, name in others:
                setattr(owner, name, getattr(*first))
        del originals
        return module

    def compile(self, module: nn.Module) -> None:
        raise ConfigError(
            "compile=True expected a device of torch.compile, got an XLA device, which compiles every step anyway; "
            "leave compile out"
        )

    def fetch(self, values: Sequence[Tensor]) -> list[float]:
        from torch_xla import _XLAC

        return [float(value) for value in _XLAC._xla_get_cpu_tensors(list(values))] if values else []

    def seed(self, seed: int) -> None:
        import torch_xla

        super().seed(seed)
        torch_xla.manual_seed(seed, self.device)

    def flush(self) -> None:
        import torch_xla

        torch_xla.sync()

    def programs(self) -> Programs:
        from torch_xla.debug import metrics

        return Programs(metrics.counter_value("UncachedCompile") or 0, tuple(metrics.executed_fallback_ops()))

    def close(self) -> None:
        self._closed = True
        self._control.close()

    def _start_gather(self, data: Tensor) -> Callable[[], Tensor]:
        return self._control._start_gather(data)

    def _spread(self, data: Tensor, source: int) -> None:
        self._control._spread(data, source)

    def gather_recorded(self, tensor: Tensor) -> Tensor:
        if self.world_size == 1:
            return tensor.clone().unsqueeze(0)
        return _gather_bits(tensor)

    def _reduce(self, text: str, tensor: Tensor, op: str) -> Tensor:
        if tensor.is_complex():  # torch_xla adds some of them as real numbers
            return super()._reduce(text, tensor.cpu(), op).to(tensor.device)
        return super()._reduce(text, tensor, op)

    def _fold(self, rows: Tensor, op: str) -> Tensor:
        return super()._fold(rows.cpu(), op).to(rows.device)  # on the device every op, dtype and shape is a program

    def _gather_tensor(self, text: str, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu" or not tensor.numel():
            return super()._gather_tensor(text, tensor)
        if tensor.is_complex():
            return super()._gather_tensor(text, tensor.cpu()).to(tensor.device)
        with self._contact(text):
            # The recorded operations may be another program on each rank. After this flush the tensor is plain data.
            self.flush()
            rows = self.gather_recorded(tensor)
            self.flush()
        return rows

    def _spread_tensor(
        self, text: str, value: Tensor | None, source: int, dtype: torch.dtype, shape: tuple[int, ...], on_host: bool
    ) -> Tensor:
        if on_host:
            return super()._spread_tensor(text, value, source, dtype, shape, on_host)
        if self.rank == source and value is not None:
            own = value.detach()
        else:
            # It is data, not a constant of the program, because the program must be the same on every rank.
            own = torch.zeros(shape, dtype=dtype).to(self.device)
        return self._gather_tensor(text, own)[source].clone()


def _gather_bits(tensor: Tensor) -> Tensor:
    """Record the gather of `tensor` from all replicas, [world_size, *S].

    Floats are gathered as integers of their width. XLA's CPU device gathers by an addition to zeros, which turns -0.0
    into 0.0 and the smallest numbers into zero.
    """
    from torch_xla.core import xla_model

    if tensor.dtype == torch.bool:
        return _gather_bits(tensor.to(torch.uint8)).to(torch.bool)
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    flat = tensor.reshape(1, -1)
    integers, floats = _XLA_NAMES.get(tensor.dtype, ("", ""))
    if integers:
        flat = _reinterpreted(integers)(flat)
    # With pin_layout=True it would be an all-reduce whose program depends on the rank.
    rows: Tensor = xla_model.all_gather(flat, pin_layout=False)
    if floats:
        rows = _reinterpreted(floats)(rows)
    return rows.reshape(len(rows), *tensor.shape)


_XLA_NAMES = {
    torch.float64: ("S64", "F64"),
    torch.float32: ("S32", "F32"),
    torch.float16: ("S16", "F16"),
    torch.bfloat16: ("S16", "BF16"),
}
"""XLA's names for each float type: of the integer of its width, and of the type."""


@functools.cache
def _reinterpreted(name: str) -> Callable[[Tensor], Tensor]:
    """Return the operation that reads a tensor's bits as another type; torch's `view` would fall back to the CPU."""
    from torch_xla.core import xla_builder, xla_op_registry

    xla_type = getattr(xla_builder.Type, name)
    operation: Callable[[Tensor], Tensor] = xla_op_registry.register(
        f"disttrain_{name}", lambda tensor: tensor.bitcast(xla_type)
    )
    return operation
