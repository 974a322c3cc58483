"""The bytes of the tensors that come and go while code runs: from the allocator of a device, or counted on the CPU.

*Contract*: `live()` is the bytes of tensors that were made since the watch began and still exist; `peak` the most of
them at one time. Memory that a kernel or a collective takes for itself is in the numbers of a device, and not in those
of the CPU. On the CPU a TorchDispatchMode sees every operation, so the code runs slower meanwhile; compiled code is not
seen.

*Source*: torch.distributed._tools.mem_tracker, for weak references to storages and for storages that FSDP2 resizes.
"""

import weakref
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from disttrain.devices import device_row


class TensorWatch(Protocol):
    """Counts the bytes of tensors; a context."""

    @property
    def peak(self) -> int: ...

    def live(self) -> int: ...

    def forget_peak(self) -> None:
        """Let `peak` begin anew with what is live."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def watch_on(device: torch.device) -> TensorWatch:
    """Return the watch for tensors on a device."""
    return DeviceWatch(device) if device_row(device).counts_memory else HostWatch()


class DeviceWatch:
    """The statistics of a device's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = 0

    def live(self) -> int:
        return torch.accelerator.memory_allocated(self._device) - self._begin

    @property
    def peak(self) -> int:
        return torch.accelerator.max_memory_allocated(self._device) - self._begin

    def forget_peak(self) -> None:
        torch.accelerator.reset_peak_memory_stats(self._device)

    def __enter__(self) -> Self:
        self._begin = torch.accelerator.memory_allocated(self._device)
        self.forget_peak()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class HostWatch(TorchDispatchMode):
    """Counts the storages of the tensors that operations return; `_sizes` holds those that exist."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._resize: Any = None
        self._live = 0
        self._peak = 0

    @property
    def peak(self) -> int:
        return self._peak

    def live(self) -> int:
        return self._live

    def forget_peak(self) -> None:
        self._peak = self._live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._take(storage, 0)  # what is not known yet is older than the watch
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._take(storage, storage.nbytes())
        return out

    def _take(self, storage: Any, size: int) -> None:
        """Count a storage that is met for the first time by `size`."""
        key = storage._cdata
        if key not in self._sizes:
            self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
            self._sizes[key] = 0
            self._add(key, size)

    def _add(self, key: int, size: int) -> None:
        self._sizes[key] += size
        self._live += size
        self._peak = max(self._peak, self._live)

    def _forget(self, key: int) -> None:
        self._live -= self._sizes.pop(key, 0)
        self._references.pop(key, None)

    def __enter__(self) -> Self:
        watch, resize = self, torch.UntypedStorage.resize_
        self._resize = resize

        def noted(storage: Any, size: int) -> Any:
            before = storage.nbytes()
            result = resize(storage, size)
            if storage.device.type == "cpu":
                watch._take(storage, 0)
                watch._add(storage._cdata, size - before)
            return result

        torch.UntypedStorage.resize_ = noted  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]


def _storages(values: Any) -> Iterator[Any]:
    """Yield the storages on the CPU of all tensors in nested values."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield from _of_tensor(leaf)


def _of_tensor(tensor: Any) -> Iterator[Any]:
    if is_traceable_wrapper_subclass(tensor):  # such as a DTensor, whose own storage is empty
        for inner in (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]):
            yield from _of_tensor(inner) if isinstance(inner, Tensor) else ()
    elif tensor.device.type == "cpu" and tensor.layout == torch.strided:
        with suppress(RuntimeError, NotImplementedError):  # of a class whose tensors have no storage
            yield tensor.untyped_storage()
