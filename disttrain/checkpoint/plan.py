"""Decides which rank writes which tensors: each rank flattens its state and gets its share.

*Contract*: the ranks that hold a DTensor write it, each part once. Whole tensors, which all ranks have alike, are
spread over the ranks, so that each writes about as many bytes. Rank 0 writes the tree of plain values and all small
tensors; those may differ between ranks, such as the states of random number generators. A share is a pure function of
the ranks' summaries, which `all_gather` returns to each rank, so all ranks have the same table.

If there are DTensors, `DefaultSavePlanner` of torch.distributed.checkpoint (DCP) makes the plan: it lists the chunks of
each rank, drops duplicates and balances. Its own collectives would bypass the backend's, so a rank that fails would
leave the others waiting. The plans travel by one `all_gather` instead, and only if the state has changed its structure.

*Errors*: a CheckpointError on every rank if a state cannot be held, or if the states differ in their DTensors.
"""

import hashlib
import json
from typing import Any, NamedTuple

from torch import Tensor

from disttrain.checkpoint import dtensors
from disttrain.checkpoint.agree import CheckpointRanks
from disttrain.checkpoint.manifest import MAX_STEP, Cut, Table
from disttrain.checkpoint.state_tree import Flat, dtype_name, flatten
from disttrain.checkpoint.tensor_writer import check_dtypes
from disttrain.errors import CheckpointError

WORTH_A_FILE_BYTES = 2**20
"""Fewer ranks write whole tensors if the files would be smaller than this."""

SMALL_TENSOR_BYTES = 2**16
"""Rank 0 writes whole tensors that are smaller than this."""


class Share(NamedTuple):
    """The tensors that one rank writes of a state."""

    flat: Flat
    """The tree of the whole state, and the tensors that this rank writes; none of them is a DTensor."""
    num_files: int
    """The number of ranks that write, which are the first ones; 1 for rank 0 alone."""
    table: Table | None
    """The table of the whole state; None if one file holds all tensors."""


class Planner:
    """Makes shares; it keeps the last table, for a run saves the same structure again and again."""

    def __init__(self, backend: CheckpointRanks | None) -> None:
        self._backend = backend
        self._last: tuple[Any, Table] | None = None

    def share(self, step: int, state: Any) -> Share:
        """Return this rank's share of a state; every rank calls this, and it fails on all ranks or on none."""
        if self._backend is None or self._backend.world_size == 1:
            return Share(_with_local_parts(_flatten_checked(step, state)), 1, None)
        flat, refusal = Flat(None, {}), ""
        try:
            flat = _flatten_checked(step, state)
        except CheckpointError as error:
            refusal = str(error)
        has_dtensors = any(map(dtensors.is_dtensor, flat.tensors.values()))
        summary = (refusal, "" if refusal else _structure(flat.tensors), has_dtensors)
        summaries = self._backend.all_gather(summary)
        num_writers = self._num_writers(summaries, flat)
        if num_writers == 1:
            return Share(flat, 1, None)
        any_dtensors = any(has_dtensors for _, _, has_dtensors in summaries)
        table = self._table(flat.tensors, num_writers, any_dtensors=any_dtensors, key=summaries)
        own = {
            name: _local_part(flat.tensors[name])
            for name, entry in table.items()
            if self._backend.rank + 1 in _files_in(entry)
        }
        return Share(Flat(flat.tree, own), num_writers, table)

    def _num_writers(self, summaries: list[tuple[str, str, bool]], flat: Flat) -> int:
        """Return the number of ranks that write; CheckpointError on all ranks if the state cannot be saved."""
        assert self._backend is not None
        any_dtensors = any(has_dtensors for _, _, has_dtensors in summaries)
        refusals = [refusal for refusal, _, _ in summaries if refusal]
        differing = [rank for rank, (_, structure, _) in enumerate(summaries) if structure != summaries[0][1]]
        if summaries[0][0] or (refusals and any_dtensors):
            raise CheckpointError(summaries[0][0] or refusals[0])
        if any_dtensors:
            if differing:
                raise CheckpointError(
                    f"rank {differing[0]} has other tensors to save than rank 0; expected the same names, dtypes, "
                    "shapes and shards on every rank where some are spread over the ranks"
                )
            return self._backend.world_size
        if differing:  # rank 0 writes its own state alone
            return 1
        return min(self._backend.world_size, max(1, _num_bytes(flat.tensors) // WORTH_A_FILE_BYTES))

    def _table(self, tensors: dict[str, Tensor], num_writers: int, *, any_dtensors: bool, key: Any) -> Table:
        """Return the table of the state; the last one if the summaries, which are the `key`, have not changed."""
        if self._last is None or self._last[0] != key:
            small = {
                name for name, t in tensors.items() if t.nbytes < SMALL_TENSOR_BYTES and not dtensors.is_dtensor(t)
            }
            large = {name: tensor for name, tensor in tensors.items() if name not in small}
            table = self._planned_by_dcp(large) if any_dtensors else _balanced(large, num_writers)
            table |= dict.fromkeys(small, 1)
            self._last = (key, {name: table[name] for name in tensors})
        return self._last[1]

    def _planned_by_dcp(self, tensors: dict[str, Tensor]) -> Table:
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

        assert self._backend is not None
        planner = DefaultSavePlanner(flatten_state_dict=False)
        planner.set_up_planner(dict(tensors), is_coordinator=self._backend.rank == 0)
        plans, _ = planner.create_global_plan(self._backend.all_gather(planner.create_local_plan()))
        chunks: dict[str, list[tuple[int, Any]]] = {}
        for number, plan in enumerate(plans, 1):
            for item in plan.items:
                assert item.tensor_data is not None
                chunks.setdefault(item.index.fqn, []).append((number, item.tensor_data.chunk))
        return {name: _table_entry(tuple(tensors[name].shape), chunks[name]) for name in tensors}


def _flatten_checked(step: int, state: Any) -> Flat:
    """Return the state's tree and tensors; CheckpointError if a checkpoint cannot hold it."""
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise CheckpointError(f"expected a step from 0 to {MAX_STEP}, got {step!r}")
    flat = flatten(state)
    check_dtypes(flat.tensors)
    return flat


def _num_bytes(tensors: dict[str, Tensor]) -> int:
    """Return the bytes of the tensors; a DTensor counts whole."""
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def _structure(tensors: dict[str, Tensor]) -> str:
    """Return a hash of the names, dtypes, shapes and placements of the tensors, without their values."""
    lines = [
        [name, dtype_name(tensor.dtype), list(tensor.shape), dtensors.placement_text(tensor)]
        for name, tensor in tensors.items()
    ]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _balanced(tensors: dict[str, Tensor], num_writers: int) -> Table:
    """Assign each whole tensor, the largest first, to the rank that has the fewest bytes so far."""
    loads = [0] * num_writers
    table: Table = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        least = loads.index(min(loads))
        loads[least] += tensors[name].nbytes
        table[name] = least + 1
    return table


def _table_entry(shape: tuple[int, ...], chunks: list[tuple[int, Any]]) -> int | Cut:
    """Return the entry of the table for a tensor whose chunks DCP has assigned to files."""
    held = [(number, chunk) for number, chunk in chunks if 0 not in chunk.sizes]
    if not held:  # the tensor has no elements
        return 1
    for dim, size in enumerate(shape):
        if any(chunk.sizes[dim] != size for _, chunk in held):
            return Cut(dim=dim, chunks=[[number, chunk.offsets[dim], chunk.sizes[dim]] for number, chunk in held])
    return held[0][0]


def _files_in(entry: int | Cut) -> list[int]:
    """Return the numbers of the files that hold a tensor."""
    return [entry] if isinstance(entry, int) else [number for number, _, _ in entry.chunks]


def _local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor; a tensor without elements is returned whole."""
    if not dtensors.is_dtensor(tensor):
        return tensor
    local = dtensors.local_part(tensor)
    return local if tensor.numel() else local.new_empty(tensor.shape)


def _with_local_parts(flat: Flat) -> Flat:
    """Return the state of a single rank with plain tensors in the place of DTensors: its part is all of them."""
    return Flat(flat.tree, {name: _local_part(tensor) for name, tensor in flat.tensors.items()})
