"""One number for all the weights of a model, to tell whether two runs ended with the same bits."""

import hashlib
import json
from collections.abc import Callable

from torch import Tensor, nn

from disttrain.checkpoint.tensors import little_endian_bytes
from disttrain.checkpoint.tree import dense, dtype_name


def params_sha256(model: nn.Module, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> str:
    """Return the sha256 over the parameters and buffers of the bare `model`, in the order of their names.

    Each goes in as a JSON line `["name", "dtype", [shape]]`, a newline, and its values in row-major order as
    little-endian bytes. A tensor under two names goes in under both. `whole` gives all of a tensor of which this rank
    holds a part, and is called for all in the same order. *Cost*: one pass, about 1 GB/s; one tensor at a time is
    copied from a device.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = dense(whole(tensors[name]), name)
        digest.update(json.dumps([name, dtype_name(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(little_endian_bytes(tensor))
    return digest.hexdigest()
