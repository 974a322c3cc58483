"""Numbers that tell whether a tensor has changed.

*Contract*: a version differs if a tensor was replaced or changed in place. A fingerprint differs also after a change by
`.data`, which no version counts. A fingerprint by place tells apart tensors with the same words in another order, so
two gradients with the same one have the same bits (but for an accident of one in 2**64).

*Cost*: a version is a number that torch keeps. A fingerprint is one pass over the tensor where it lies, one by place
about four; all of a call wait for the device once.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from disttrain.devices import device_row
from disttrain.parallel.layout import part_here

PIECE, HOST_PIECE = 2**18, 2**14
"""The words that are multiplied at once: on a device few and large ones, on the host those that its caches hold."""
MULTIPLIER = 0x2545F4914F6CDD1D

Versions = dict[str, tuple[int, int | None]]
Fingerprints = dict[str, tuple[int, int | None, int]]


def versions(named: Iterable[tuple[str, Tensor]]) -> Versions:
    """Return, by name, numbers that differ if a tensor is replaced or changed in place."""
    return {name: (id(tensor), None if tensor.is_inference() else tensor._version) for name, tensor in named}


def fingerprints(named: Iterable[tuple[str, Tensor]]) -> Fingerprints:
    """Return, by name, numbers that differ after any change of a tensor. On XLA they are the versions alone."""
    tensors = dict(named)
    views_bytes = all(device_row(tensor.device).views_bytes for tensor in tensors.values())
    values = fetched([_sum_of_bits(tensor) for tensor in tensors.values()]) if views_bytes else [0] * len(tensors)
    return {
        name: (*version, value)
        for (name, version), value in zip(versions(tensors.items()).items(), values, strict=True)
    }


def fingerprints_by_place(tensors: Sequence[Tensor | None]) -> list[int]:
    """Return, for each tensor, a number that differs if a bit of it does."""
    return fetched(
        [torch.zeros((), dtype=torch.int64) if each is None else fingerprint_by_place(each) for each in tensors]
    )


def fingerprint_by_place(tensor: Tensor) -> Tensor:
    """Return a sum of a tensor's bits, on its device, in which each word counts by its place."""
    if tensor.layout != torch.strided:
        return torch.ones((), dtype=torch.int64)  # a sparse gradient, which is refused later
    words = _words(tensor)
    size = HOST_PIECE if words.is_cpu else PIECE
    weights = torch.arange(1, min(size, words.numel()) + 1, device=words.device) * MULTIPLIER | 1
    total = torch.ones((), dtype=torch.int64, device=words.device)
    for piece in torch.split(words, size):
        total = total * MULTIPLIER + (piece * weights[: piece.numel()]).sum()
    return total


def fetched(values: Sequence[Tensor]) -> list[int]:
    """Fetch 0-dimensional tensors, with one wait for each device."""
    by_device: dict[torch.device, list[int]] = {}
    for i, each in enumerate(values):
        by_device.setdefault(each.device, []).append(i)
    found = [0] * len(values)
    for index in by_device.values():
        for i, value in zip(index, torch.stack([values[i] for i in index]).tolist(), strict=True):
            found[i] = value
    return found


def _sum_of_bits(tensor: Tensor) -> Tensor:
    return _words(part_here(tensor)).sum(dtype=torch.int64)


def _words(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers."""
    values = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    return values.view(torch.int32) if values.numel() % 4 == 0 and values.storage_offset() % 4 == 0 else values
