"""The copy of a state that is written while the training goes on.

*Cost*: memory for one copy of what this rank writes, on the host, kept from save to save: to touch new memory for the
first time takes longer than to copy into it.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from disttrain.checkpoint.tensors import as_copied

COPYING_THREADS = 4


class Staging:
    """Memory that is kept from save to save."""

    def __init__(self) -> None:
        self.copies: dict[str, Tensor] = {}

    def copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the tensors to the CPU, into the memory of the last copies where it fits."""
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            copy = self.copies.get(name)
            if copy is None or (copy.dtype, copy.shape) != (tensor.dtype, tensor.shape):
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name] = copy
        pairs = [(copies[name], tensor) for name, tensor in tensors.items()]
        with ThreadPoolExecutor(COPYING_THREADS) as pool:  # a run's ranks compute with one thread each, by default
            done = pool.map(lambda pair: _copy(*pair), [pair for pair in pairs if pair[1].device.type == "cpu"])
            for copy, tensor in pairs:
                if tensor.device.type != "cpu":
                    _copy(copy, tensor)  # behind what this thread's stream has still to compute
            list(done)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        self.copies = copies
        return copies


def _copy(into: Tensor, tensor: Tensor) -> None:
    """Copy the values; from CUDA the stream has to be waited for."""
    dense = tensor.is_contiguous() and tensor.numel() and tensor.ndim and not (tensor.is_conj() or tensor.is_neg())
    if dense and tensor.device.type != "xla":  # which has no such view: it would copy to the host and back for it
        into, tensor = into.view(torch.uint8), tensor.view(torch.uint8)
    elif tensor.device.type == "cpu":
        into, tensor = as_copied(into), as_copied(tensor)
    into.copy_(tensor, non_blocking=tensor.is_cuda)
