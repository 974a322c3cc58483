"""Hashes of tensors and batches: small enough for a ledger, and different if a single bit differs.

*Contract*: a hash is 16 hex digits, made from a tensor's dtype, shape and values. It is the same on CPU and CUDA. It
finds accidents, not forgeries. The signs of zeros and of NaNs count.

*Cost*: one pass on the tensor's own device (about 3 GB/s on one core), and one copy to the host for all tensors
together, of at most 4 KiB a tensor. On devices that cannot hash, the tensor itself is copied to the host.

*Source*: `torch.hash_tensor` (torch 2.9), an exclusive or over 64-bit values. Over a whole tensor it would miss two
values that swap places or change sign together. So it is taken over short runs of neighbours, and BLAKE2b hashes the
results in their order.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disttrain.devices import device_row
from disttrain.parallel.optimizers import by_prefix

NUM_RUNS = 256
"""The least number of runs of neighbours in a tensor; a smaller tensor is cut into single values."""


def tensor_hashes(
    tensors: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[str, str]:
    """Return the hash of each tensor, by the same names.

    `whole` returns the full tensor where this rank holds a part of it. It is called for each tensor in the mapping's
    order.
    """
    runs = {name: _runs(whole(tensor.detach())) for name, tensor in tensors.items()}
    if not runs:
        return {}
    # One copy to the host for all: on an accelerator each copy waits for all queued work.
    devices = {run.device for run in runs.values()}
    on_host = torch.cat(list(runs.values())).cpu() if len(devices) == 1 else torch.cat([r.cpu() for r in runs.values()])
    values, start, hashes = on_host.numpy(), 0, {}
    for name, run in runs.items():
        header = f"{tensors[name].dtype} {tuple(tensors[name].shape)}".encode()
        own_values = values[start : start + run.numel()]
        hashes[name] = hashlib.blake2b(header + own_values.astype("<u8").tobytes(), digest_size=8).hexdigest()
        start += run.numel()
    return hashes


def _runs(tensor: Tensor) -> Tensor:
    """Return a vector of torch's 64-bit hashes, one for each run of neighbours in the tensor's logical order."""
    if not device_row(tensor.device).hashes:
        tensor = tensor.cpu()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.resolve_neg().reshape(-1)
    if flat.is_floating_point() and flat.element_size() == 1:
        flat = flat.view(torch.uint8)
    width = max(1, flat.numel() // NUM_RUNS)
    end = flat.numel() // width * width  # of the last full run
    if end == 0:
        return torch.empty(0, dtype=torch.uint64, device=flat.device)
    runs = torch.hash_tensor(flat[:end].view(-1, width), dim=1)
    return runs if end == flat.numel() else torch.cat([runs, torch.hash_tensor(flat[end:], dim=0, keepdim=True)])


def batch_hash(batch: Any) -> str:
    """Return the hash of a batch: tensors, arrays, numbers and texts, in lists, tuples and dicts.

    Of another object its attributes count, or only its type if it has no attributes.
    """
    tensors: dict[str, Tensor] = {}
    texts = []
    for i, part in enumerate(_parts_of_batch(batch)):
        if isinstance(part, Tensor):
            tensors[str(i)] = part
        else:
            texts.append(f"{i} {part}")
    texts += [f"{name} {tensor_hash}" for name, tensor_hash in tensor_hashes(tensors).items()]
    return hashlib.blake2b("\n".join(texts).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _parts_of_batch(value: Any) -> Iterator[Tensor | str]:
    """Yield the parts of a batch in a fixed order, tensors unchanged and all others as text."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        yield torch.from_numpy(np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}").astype(np.int64))
        yield f"{value.dtype} {value.shape}"
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, Mapping):
        yield f"{type(value).__name__} of {len(value)}"
        for key, item in value.items():
            yield f"key {key!r}"
            yield from _parts_of_batch(item)
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__} of {len(value)}"
        for item in value:
            yield from _parts_of_batch(item)
    else:
        yield type(value).__qualname__
        yield from _parts_of_batch(vars(value)) if hasattr(value, "__dict__") else ()


def state_tensors(
    parts: Mapping[str, nn.Module], optimizer: Optimizer, kept: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Tensor]:
    """Return the state on which the next step's result depends, by name: parameters, buffers, optimizer state.

    `parts` are modules by name: "model", and "loss" if it has a state. The names of the tensors are `PART.NAME`,
    `optimizer.NAME.KEY` with the parameter's NAME (of several optimizers `optimizer.UPDATE.NAME.KEY`), and
    `kept.OBJECT.PATH`. `kept` holds objects with a `state_dict`.
    Their plain values become tensors of the bytes of their text.
    """
    tensors: dict[str, Tensor] = {}
    names = {}
    for part, module in parts.items():
        for name, parameter in module.named_parameters():
            tensors[f"{part}.{name}"] = parameter
            names[parameter] = name if part == "model" else f"{part}.{name}"
        tensors.update((f"{part}.{name}", buffer) for name, buffer in module.named_buffers())
    for prefix, each in by_prefix(optimizer).items():
        parameters = [parameter for group in each.param_groups for parameter in group["params"]]
        for i, parameter in enumerate(parameters):
            for key, value in each.state.get(parameter, {}).items():
                if isinstance(value, Tensor | bool | int | float):
                    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
                    tensors[f"{prefix}.{names.get(parameter, i)}.{key}"] = tensor
    for name, kept_object in kept.items():
        tensors.update(_values_by_path(kept_object.state_dict(), f"kept.{name}"))
    return tensors


def _values_by_path(state: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (dotted path, tensor) for every value of a nested state; a plain value becomes the bytes of its text."""
    if isinstance(state, Tensor):
        yield path, state
        return
    if isinstance(state, np.ndarray):
        text = f"{state.dtype} {state.shape} ".encode()
        yield path, torch.frombuffer(bytearray(text + state.tobytes()), dtype=torch.uint8)
        return
    items: list[tuple[Any, Any]] = []
    if isinstance(state, Mapping):
        items = list(state.items())
    elif isinstance(state, list | tuple):
        items = list(enumerate(state))
    if any(isinstance(value, Tensor | np.ndarray | Mapping | list | tuple) for _, value in items) or isinstance(
        state, Mapping
    ):
        for key, value in items:
            yield from _values_by_path(value, f"{path}.{key}")
    else:
        text = f"{type(state).__qualname__} {state!r}".encode(errors="backslashreplace")
        yield path, torch.frombuffer(bytearray(text), dtype=torch.uint8)
