"""Fingerprints hold what was sent against what arrived, and name the sender, or the way between two ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor

from disttrain.backend import Backend
from disttrain.parallel import Slots, TreeReduce
from disttrain.parallel import tree as tree_module
from disttrain.parallel.audit_exchange import Prints, SentPieces, exchange_faults
from disttrain.parallel.audit_verdicts import Fault

NUM_SLOTS = 3
SENDER = 1


def reduced(backend: Backend, changes: str, small_bytes: int) -> tuple[Prints, list[float]]:
    """Return the fingerprints of a reduction and its result; rank 1 changes its buffer, or sends a changed copy."""
    tree_module.SMALL_MESSAGE_BYTES, whole = small_bytes, tree_module.SMALL_MESSAGE_BYTES
    send = dist.batch_isend_irecv

    def changed(ops: list[Any]) -> Any:
        for op in ops:
            if op.op is dist.isend and op.group_peer == 2 and backend.rank == SENDER:
                if changes == "on the way":
                    op.tensor = op.tensor.clone()
                op.tensor.view(torch.int32)[0] ^= 1
                break
        return send(ops)

    dist.batch_isend_irecv = changed if changes else send
    try:
        slots = Slots(NUM_SLOTS, backend.rank, backend.world_size)
        tree = TreeReduce(slots, backend.process_group)
        tree.watch = SentPieces()
        parts: dict[tuple[int, int], Tensor] = {node: torch.arange(8.0) + node[0] for node in slots.nodes(backend.rank)}
        total = tree.reduce(parts)
        return tree.watch.prints(), total.tolist()
    finally:
        dist.batch_isend_irecv, tree_module.SMALL_MESSAGE_BYTES = send, whole


@pytest.mark.parametrize("small_bytes", [0, 2**20])  # in two rounds and in one
@pytest.mark.parametrize(
    ("changes", "ranks_named"), [("", set()), ("in the buffer", {(SENDER,)}), ("on the way", {(SENDER, 2)})]
)
def test_the_sender_or_the_way_is_named(
    ranks: Ranks, changes: str, ranks_named: set[tuple[int, ...]], small_bytes: int
) -> None:
    ends = ranks(3, reduced, changes, small_bytes)
    faults = exchange_faults([prints for prints, _ in ends])
    assert {fault.ranks for fault in faults} == ranks_named
    assert all(isinstance(fault, Fault) and fault.kind == "transient" for fault in faults)
    if not changes:
        assert [total for _, total in ends] == [[3.0 * i + 3 for i in range(8)]] * 3


def test_nothing_is_noted_where_nobody_asks() -> None:
    tree = TreeReduce(Slots(1), None)
    assert tree.watch is None
    assert SentPieces().prints() == {}
