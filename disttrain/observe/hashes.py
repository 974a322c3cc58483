"""Hashes of tensors and batches: small enough to write down, different when a bit is.

*Contract*: a hash is 16 hex digits of a tensor's dtype, shape and values, of one meaning on CPU and CUDA. Made to
find accidents, not forgeries. The sign of a zero counts, and so does a NaN's.

*Cost*: one pass on the device where the tensor lies (about 3 GB/s on one core) and one copy of at most 4 KiB a tensor
to the host, all tensors together in one. Other devices than CPU and CUDA copy the tensor itself.

*Source*: `torch.hash_tensor` (torch 2.9), which is an exclusive or over 64-bit values. Over a whole tensor that would
not see two values that swap places or change sign together, so it is taken over short runs of neighbours, whose
results go into BLAKE2b in their order.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NUM_RUNS = 256
"""A tensor is cut into at least so many runs of neighbours, a smaller one into single values."""
HASHED_WHERE_THEY_LIE = ("cpu", "cuda")


def tensor_hashes(
    tensors: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[str, str]:
    """Return the hash of each tensor, by the same names.

    `whole` gives all of a tensor of which this rank holds a part; it is called one by one, in the mapping's order.
    """
    runs = {name: _runs(whole(tensor.detach())) for name, tensor in tensors.items()}
    if not runs:
        return {}
    # Brought to the host together: on an accelerator each copy waits for all the work that is queued.
    devices = {run.device for run in runs.values()}
    on_host = torch.cat(list(runs.values())).cpu() if len(devices) == 1 else torch.cat([r.cpu() for r in runs.values()])
    values, start, found = on_host.numpy(), 0, {}
    for name, run in runs.items():
        said = f"{tensors[name].dtype} {tuple(tensors[name].shape)}".encode()
        part = values[start : start + run.numel()]
        found[name] = hashlib.blake2b(said + part.astype("<u8").tobytes(), digest_size=8).hexdigest()
        start += run.numel()
    return found


def _runs(tensor: Tensor) -> Tensor:
    """Return a vector of torch's 64-bit hashes, one for each run of neighbours in the tensor's logical order."""
    if tensor.device.type not in HASHED_WHERE_THEY_LIE:
        tensor = tensor.cpu()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.resolve_neg().reshape(-1)
    if flat.is_floating_point() and flat.element_size() == 1:
        flat = flat.view(torch.uint8)
    width = max(1, flat.numel() // NUM_RUNS)
    whole = flat.numel() // width * width
    if whole == 0:
        return torch.empty(0, dtype=torch.uint64, device=flat.device)
    runs = torch.hash_tensor(flat[:whole].view(-1, width), dim=1)
    return runs if whole == flat.numel() else torch.cat([runs, torch.hash_tensor(flat[whole:], dim=0, keepdim=True)])


def batch_hash(batch: Any) -> str:
    """Return the hash of what a batch holds: tensors, arrays, numbers and texts in lists, tuples and dicts.

    Of other objects their attributes count, or where they have none their type alone.
    """
    tensors: dict[str, Tensor] = {}
    texts = []
    for i, part in enumerate(_parts(batch)):
        if isinstance(part, Tensor):
            tensors[str(i)] = part
        else:
            texts.append(f"{i} {part}")
    texts += [f"{name} {found}" for name, found in tensor_hashes(tensors).items()]
    return hashlib.blake2b("\n".join(texts).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _parts(value: Any) -> Iterator[Tensor | str]:
    """Yield what a batch is made of, tensors as they are and all else as text, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        yield torch.from_numpy(np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}").astype(np.int64))
        yield f"{value.dtype} {value.shape}"
    elif value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, Mapping):
        yield f"{type(value).__name__} of {len(value)}"
        for key, inside in value.items():
            yield f"key {key!r}"
            yield from _parts(inside)
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__} of {len(value)}"
        for inside in value:
            yield from _parts(inside)
    else:
        yield type(value).__qualname__
        yield from _parts(vars(value)) if hasattr(value, "__dict__") else ()


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return by name everything that the next step's result depends on: parameters, buffers, optimizer state.

    Names are `model.NAME`, and `optimizer.NAME.KEY` with NAME the parameter's.
    """
    found: dict[str, Tensor] = {}
    names = {}
    for name, parameter in model.named_parameters():
        found[f"model.{name}"] = parameter
        names[parameter] = name
    found.update((f"model.{name}", buffer) for name, buffer in model.named_buffers())
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor | bool | int | float):
                tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
                found[f"optimizer.{names.get(parameter, i)}.{key}"] = tensor
    return found
