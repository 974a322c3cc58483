"""Sums a tensor over the slots of all ranks in the grouping of the slots' tree: the same bits on any number of ranks.

*Contract*: every rank passes the sums of its own nodes (`Slots.nodes`) as flat tensors of one size, dtype and device.
Every rank gets the sum over all slots divided by `divisor`, with the same bits. The bits of an element depend only on
the elements at the same index: not on the number of ranks, the size of the tensor or its other elements. float16 and
bfloat16 are summed and divided in float32 and rounded once, at the end.

*Errors*: RuntimeError from the process group if a peer has gone, or has been silent for the group's timeout.

*Cost*: each of W ranks owns 1/W of the tensor. It receives this piece of every node, folds the pieces and sends the sum
to all. That is two rounds of messages. Each rank sends 2(W-1)/W of the tensor, as in a ring all-reduce, if a rank's
slots are one node (W and V powers of two, or one slot per rank), and up to twice that otherwise. Small tensors go whole
to every rank, in one round. `start_scatter` is the first round alone, for sums of which each rank keeps its own piece.
Memory: what a rank receives before it folds, (W-1)/W of the tensor for one node per rank. It is kept between calls.

*Source*: direct exchange, the all-to-all form of reduce-scatter and all-gather. It took 1.0, 0.8 and 0.75 times as long
as recursive halving and doubling on gloo, on 2, 4 and 8 ranks: it has two rounds for any W.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from disttrain.parallel.audit_exchange import SentPieces
from disttrain.parallel.slots import Node, Slots

SMALL_MESSAGE_BYTES = 2 * 1024**2
"""A rank sends its whole parts to every rank if that is at most this many bytes: a second round would cost more."""

Message = tuple[Callable[..., Any], Tensor, int]
"""`dist.isend` or `dist.irecv`, the tensor, and the other rank of the group."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of `dtype` are summed: float32 for the 16-bit floats, otherwise `dtype`."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _add(left: Tensor, right: Tensor) -> Tensor:
    return left.add_(right)


class Reduction:
    """One reduction under way, in rounds of messages; its tensors belong to it until `wait` has returned."""

    def __init__(self, out: Tensor, rounds: Iterator[list[Work]]) -> None:
        self._out = out
        self._rounds = rounds
        self._works: list[Work] | None = next(rounds, None)

    def advance(self) -> None:
        """Wait for the round under way, process the data it brought, and send the next round."""
        if self._works is not None:
            for work in self._works:
                work.wait()
            self._works = next(self._rounds, None)

    def wait(self) -> Tensor:
        """Finish all rounds and return the result."""
        while self._works is not None:
            self.advance()
        return self._out


class TreeReduce:
    """Reduces tensors over one run's slots. `process_group` may be None if the world size is 1.

    Several reductions may be under way at once, if every rank starts and advances them in the same order.
    """

    def __init__(self, slots: Slots, process_group: ProcessGroup | None) -> None:
        if process_group is None and slots.world_size > 1:
            raise ValueError(f"world_size={slots.world_size} needs a process group, got None")
        if process_group is not None and (process_group.rank(), process_group.size()) != (slots.rank, slots.world_size):
            raise ValueError(
                f"expected a process group in which this is rank {slots.rank} of {slots.world_size}, as in the slots; "
                f"got one in which it is rank {process_group.rank()} of {process_group.size()}"
            )
        self.slots = slots
        self._group = process_group
        self._nodes = [slots.nodes(rank) for rank in range(slots.world_size)]
        self._others = [rank for rank in range(slots.world_size) if rank != slots.rank]
        self._free: list[Tensor] = []
        self.watch: SentPieces | None = None
        """Takes fingerprints of what is sent and received; None: nobody asks."""

    def reduce(self, parts: Mapping[Node, Tensor], *, out: Tensor | None = None, divisor: int = 1) -> Tensor:
        """Return the sum over all slots, divided by `divisor`, in `out` (default: the last part).

        The memory of the parts is overwritten. `out` may be one of them; it sets the dtype of the result.
        """
        return self.start(parts, out=out, divisor=divisor).wait()

    def start(self, parts: Mapping[Node, Tensor], *, out: Tensor | None = None, divisor: int = 1) -> Reduction:
        """Send the first round of `reduce` and return the reduction under way."""
        mine = self._nodes[self.slots.rank]
        if sorted(parts) != mine:
            raise ValueError(f"expected the nodes {mine} of rank {self.slots.rank}, got {sorted(parts)}")
        out = parts[mine[-1]] if out is None else out
        wide = accumulation_dtype(out.dtype)
        return Reduction(out, self._rounds({node: part.to(wide) for node, part in parts.items()}, out, divisor))

    def start_scatter(self, parts: Mapping[Node, Tensor], *, out: Tensor, divisor: int = 1) -> Reduction:
        """Start a reduction of which each rank keeps its own chunk alone: send its messages, and return the reduction.

        A part consists of `world_size` chunks as long as `out`, one after the other; rank r gets the sum of the r-th.
        """
        mine, count = self._nodes[self.slots.rank], self.slots.world_size
        if sorted(parts) != mine or any(part.numel() != count * out.numel() for part in parts.values()):
            sizes = {node: part.numel() for node, part in sorted(parts.items())}
            raise ValueError(
                f"expected the nodes {mine} of rank {self.slots.rank}, of {count} x {out.numel()} elements; got {sizes}"
            )
        wide = accumulation_dtype(out.dtype)
        chunks = [slice(out.numel() * r, out.numel() * (r + 1)) for r in range(count)]
        return Reduction(
            out, self._folding({node: part.to(wide) for node, part in parts.items()}, chunks, out, divisor)
        )

    def _rounds(self, parts: dict[Node, Tensor], out: Tensor, divisor: int) -> Iterator[list[Work]]:
        """Fold this rank's chunk, then exchange the sums of all chunks."""
        rank, size = self.slots.rank, out.numel()
        whole = len(self._others) * size * out.element_size() <= SMALL_MESSAGE_BYTES
        chunks = self._chunks(size, whole)
        yield from self._folding(parts, chunks, out[chunks[rank]], divisor)
        if not whole:
            messages: list[Message] = [(dist.irecv, out[chunks[r]], r) for r in self._others]
            yield from self._exchanged(messages + [(dist.isend, out[chunks[rank]], r) for r in self._others])

    def _folding(
        self, parts: dict[Node, Tensor], chunks: Sequence[slice], out: Tensor, divisor: int
    ) -> Iterator[list[Work]]:
        """Send each node's chunks to the ranks that own them, and fold this rank's chunk into `out`."""
        rank = self.slots.rank
        mine = chunks[rank]
        width = mine.stop - mine.start
        foreign = [(node, r) for r in self._others for node in self._nodes[r]]
        room = self._borrow(parts[self._nodes[rank][0]], len(foreign) * width)
        chunk = {node: room[i * width : (i + 1) * width] for i, (node, _) in enumerate(foreign)}
        receives: list[Message] = [(dist.irecv, chunk[node], r) for node, r in foreign]
        sends: list[Message] = [
            (dist.isend, part[chunks[r]], r) for r in self._others for _, part in sorted(parts.items())
        ]
        yield from self._exchanged(receives + sends)
        chunk |= {node: part[mine] for node, part in parts.items()}
        torch.div(self.slots.fold(chunk, _add), divisor, out=out)
        self._free.append(room)

    def _exchanged(self, messages: Sequence[Message]) -> Iterator[list[Work]]:
        """Send and receive all messages; what comes after this in a generator has what arrived."""
        if self.watch is None:
            yield self._post(messages)
            return
        number = self.watch.begins(messages)
        yield self._post(messages)
        self.watch.ends(number, messages)

    def _chunks(self, size: int, whole: bool) -> list[slice]:
        """Return the chunk that each rank folds, by rank: the whole tensor, or its 1/W."""
        count = self.slots.world_size
        if whole:
            return [slice(0, size)] * count
        return [slice(size * r // count, size * (r + 1) // count) for r in range(count)]

    def _borrow(self, like: Tensor, size: int) -> Tensor:
        """Return uninitialised memory of at least `size` elements; a free piece that is too small is replaced."""
        same = [i for i, room in enumerate(self._free) if (room.dtype, room.device) == (like.dtype, like.device)]
        if same:
            room = self._free.pop(max(same, key=lambda i: self._free[i].numel()))
            if room.numel() >= size:
                return room
        return like.new_empty(size)

    def _post(self, messages: Sequence[Message]) -> list[Work]:
        """Send and receive all messages at once; receives come first, so no data waits for memory to arrive in."""
        ops = [dist.P2POp(op, data, group=self._group, group_peer=peer) for op, data, peer in messages if data.numel()]
        return dist.batch_isend_irecv(ops) if ops else []
