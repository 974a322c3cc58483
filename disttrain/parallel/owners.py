"""Assembles tensors that are cut over the ranks, each on one rank, its owner; and sends them back in parts.

*Contract*: tensors are cut along their first dimension, as `torch.chunk` cuts them. All ranks call the same function
with the same owners; the values are only moved.

*Cost*: a rank sends what it holds of the others' tensors, in one message for each peer and dtype, and receives the
rest of its own. It holds its own tensors whole meanwhile.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from disttrain.parallel.layout import part_here
from disttrain.parallel.tree import Message

Form = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a whole tensor."""


def owners_of(sizes: Sequence[int], world_size: int) -> list[int]:
    """Return the rank that owns each tensor, a function of the sizes alone: in turn, the largest first."""
    largest_first = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    owners = [0] * len(sizes)
    for place, index in enumerate(largest_first):
        owners[index] = place % world_size
    return owners


def num_rows(rows: int, rank: int, world_size: int) -> int:
    """Return the number of a tensor's rows that a rank holds, as `torch.chunk` cuts them."""
    most = -(-rows // world_size)
    return max(0, min(rows, most * (rank + 1)) - most * rank)


def assembled(tensors: Mapping[int, Tensor], owners: Mapping[int, int], group: ProcessGroup) -> dict[int, Tensor]:
    """Return this rank's own tensors whole, by their numbers; every rank gives its parts (DTensors) of all."""
    rank, size = group.rank(), group.size()
    forms = {index: (tuple(tensor.shape), tensor.dtype) for index, tensor in tensors.items()}
    sent = {
        peer: {index: part_here(tensors[index]) for index in tensors if owners[index] == peer}
        for peer in range(size)
        if peer != rank
    }
    awaited = {
        peer: {index: _part_form(forms[index], peer, size) for index in tensors if owners[index] == rank}
        for peer in range(size)
        if peer != rank
    }
    received = _exchanged(sent, awaited, group, _device_of(tensors))
    received[rank] = {index: part_here(tensor) for index, tensor in tensors.items() if owners[index] == rank}
    return {index: torch.cat([received[peer][index] for peer in range(size)]) for index in received[rank]}


def spread(
    wholes: Mapping[int, Tensor],
    forms: Mapping[int, Form],
    owners: Mapping[int, int],
    group: ProcessGroup,
    device: torch.device,
) -> dict[int, Tensor]:
    """Return this rank's part of each tensor, by their numbers; the owners give them whole."""
    rank, size = group.rank(), group.size()
    own = {index: whole.chunk(size) for index, whole in wholes.items()}

    def part(index: int, peer: int) -> Tensor:
        return own[index][peer] if peer < len(own[index]) else wholes[index][:0]

    others = [peer for peer in range(size) if peer != rank]
    sent = {peer: {index: part(index, peer) for index in wholes} for peer in others}
    awaited = {
        peer: {index: _part_form(form, rank, size) for index, form in forms.items() if owners[index] == peer}
        for peer in others
    }
    received = _exchanged(sent, awaited, group, device)
    parts = {index: part(index, rank) for index in wholes}
    for of_peer in received.values():
        parts |= of_peer
    return parts


def _part_form(form: Form, rank: int, world_size: int) -> Form:
    (rows, *rest), dtype = form
    return (num_rows(rows, rank, world_size), *rest), dtype


def _device_of(tensors: Mapping[int, Tensor]) -> torch.device:
    return next((tensor.device for tensor in tensors.values()), torch.device("cpu"))


def _exchanged(
    sent: Mapping[int, Mapping[int, Tensor]],
    awaited: Mapping[int, Mapping[int, Form]],
    group: ProcessGroup,
    device: torch.device,
) -> dict[int, dict[int, Tensor]]:
    """Send each peer its tensors; return the awaited ones of each peer. Both sides list them in the same order."""
    messages: list[Message] = []
    received: dict[int, dict[int, Tensor]] = {}
    for peer, forms in awaited.items():
        received[peer] = {}
        for dtype, indexes in _by_dtype({index: dtype for index, (_, dtype) in forms.items()}):
            shapes = [forms[index][0] for index in indexes]
            sizes = [torch.Size(shape).numel() for shape in shapes]
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            messages.append((dist.irecv, flat, peer))
            for index, part, shape in zip(indexes, torch.split(flat, sizes), shapes, strict=True):
                received[peer][index] = part.view(shape)
    for peer, parts in sent.items():
        for _, indexes in _by_dtype({index: part.dtype for index, part in parts.items()}):
            flat = torch.cat([parts[index].detach().reshape(-1) for index in indexes])
            messages.append((dist.isend, flat, peer))
    operations = [dist.P2POp(op, flat, group=group, group_peer=peer) for op, flat, peer in messages if flat.numel()]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return received


def _by_dtype(dtypes: Mapping[int, torch.dtype]) -> Iterator[tuple[torch.dtype, list[int]]]:
    for dtype in dict.fromkeys(dtypes.values()):
        yield dtype, [index for index, each in dtypes.items() if each == dtype]
