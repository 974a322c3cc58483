"""Who writes what: a state taken apart on every rank, and the share of it that is this rank's to write.

*Contract*: what DTensors hold is written by the ranks that hold it, and once; whole tensors, which every rank has
alike, are spread over the ranks so that each writes about as much. The tree of plain values is rank 0's, and so are
small tensors, among which are those that may differ (states of random number generators). A share is a pure function
of what `all_gather` says of every rank, so all have the same table.

DCP plans where there are DTensors: `DefaultSavePlanner` says which chunks a rank has, drops duplicates and balances.
Its own collectives would go around the backend's, where a rank that fails makes the others wait; the plans travel by
one `all_gather` instead, and only when the state has changed its structure.

*Errors*: a CheckpointError on every rank where a state cannot be held, or the ranks' differ in what is spread.
"""

import hashlib
import json
from typing import Any, NamedTuple

from torch import Tensor

from disttrain.checkpoint import sharded
from disttrain.checkpoint.agree import Ranks
from disttrain.checkpoint.manifest import MAX_STEP, Cut, Table
from disttrain.checkpoint.tensors import check_dtypes
from disttrain.checkpoint.tree import Flat, dtype_name, flatten
from disttrain.errors import CheckpointError

WORTH_A_FILE_BYTES = 2**20
"""Whole tensors are spread over fewer ranks than there are, rather than in files smaller than this."""


SMALL_BYTES = 2**16
"""A whole tensor smaller than this is rank 0's."""


class Share(NamedTuple):
    """What one rank writes of a state."""

    flat: Flat
    """The tree, and the tensors that this rank writes: plain ones."""
    num_files: int
    """How many ranks write, the first ones; 1 for rank 0 alone."""
    table: Table | None
    """Where each tensor of the whole state will lie; None in one file."""
    num_bytes: int
    """Of the whole state, over all ranks."""


class Planner:
    """Takes states apart; remembers the last plan, for a run saves the same structure again and again."""

    def __init__(self, backend: Ranks | None) -> None:
        self._backend = backend
        self._known: tuple[Any, Table] | None = None

    def share(self, step: int, state: Any) -> Share:
        """Return what this rank is to write; called by every rank, it fails on all or on none."""
        if self._backend is None or self._backend.world_size == 1:
            flat = _unspread(take_apart(step, state))
            return Share(flat, 1, None, num_bytes(flat.tensors))
        flat, refusal = Flat(None, {}), ""
        try:
            flat = take_apart(step, state)
        except CheckpointError as error:
            refusal = str(error)
        spread = any(map(sharded.is_sharded, flat.tensors.values()))
        said = self._backend.all_gather((refusal, "" if refusal else _structure(flat.tensors), spread))
        num_writers = self._writers(said, flat)
        if num_writers == 1:
            return Share(flat, 1, None, num_bytes(flat.tensors))
        table = self._table(flat.tensors, num_writers, any_spread=any(spread for _, _, spread in said), key=said)
        mine = {name: _held(flat.tensors[name]) for name, where in table.items() if _is_of(where, self._backend.rank)}
        return Share(Flat(flat.tree, mine), num_writers, table, num_bytes(flat.tensors))

    def _writers(self, said: list[tuple[str, str, bool]], flat: Flat) -> int:
        """Return how many ranks write; a CheckpointError on all where they cannot."""
        assert self._backend is not None
        refusals = [refusal for refusal, _, _ in said if refusal]
        differing = [rank for rank, (_, structure, _) in enumerate(said) if structure != said[0][1]]
        if said[0][0] or (refusals and any(spread for _, _, spread in said)):
            raise CheckpointError(said[0][0] or refusals[0])
        if any(spread for _, _, spread in said):
            if differing:
                raise CheckpointError(
                    f"rank {differing[0]} has other tensors to save than rank 0; expected the same names, dtypes, "
                    "shapes and shards on every rank where some are spread over the ranks"
                )
            return self._backend.world_size
        if differing:  # rank 0's counts
            return 1
        return min(self._backend.world_size, max(1, num_bytes(flat.tensors) // WORTH_A_FILE_BYTES))

    def _table(self, tensors: dict[str, Tensor], num_writers: int, *, any_spread: bool, key: Any) -> Table:
        if self._known is None or self._known[0] != key:
            small = {name for name, t in tensors.items() if t.nbytes < SMALL_BYTES and not sharded.is_sharded(t)}
            large = {name: tensor for name, tensor in tensors.items() if name not in small}
            table = self._planned_by_dcp(large) if any_spread else _spread(large, num_writers)
            table |= dict.fromkeys(small, 1)
            self._known = (key, {name: table[name] for name in tensors})
        return self._known[1]

    def _planned_by_dcp(self, tensors: dict[str, Tensor]) -> Table:
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

        assert self._backend is not None
        planner = DefaultSavePlanner(flatten_state_dict=False)
        planner.set_up_planner(dict(tensors), is_coordinator=self._backend.rank == 0)
        plans, _ = planner.create_global_plan(self._backend.all_gather(planner.create_local_plan()))
        found: dict[str, list[tuple[int, Any]]] = {}
        for number, plan in enumerate(plans, 1):
            for item in plan.items:
                assert item.tensor_data is not None
                found.setdefault(item.index.fqn, []).append((number, item.tensor_data.chunk))
        return {name: _where(tuple(tensors[name].shape), found[name]) for name in tensors}


def take_apart(step: int, state: Any) -> Flat:
    """Return the state's tree and tensors; CheckpointError where it cannot be held, before anything is written."""
    if type(step) is not int or not 0 <= step <= MAX_STEP:
        raise CheckpointError(f"expected a step from 0 to {MAX_STEP}, got {step!r}")
    flat = flatten(state)
    check_dtypes(flat.tensors)
    return flat


def num_bytes(tensors: dict[str, Tensor]) -> int:
    """Return the bytes of whole tensors."""
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def _structure(tensors: dict[str, Tensor]) -> str:
    """Return a hash of what the tensors are, without their values."""
    lines = [
        [name, dtype_name(tensor.dtype), list(tensor.shape), sharded.described(tensor)]
        for name, tensor in tensors.items()
    ]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def _spread(tensors: dict[str, Tensor], num_writers: int) -> Table:
    """Give each whole tensor, the largest first, to the rank that has the least so far."""
    loads = [0] * num_writers
    table: Table = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].nbytes, name)):
        least = loads.index(min(loads))
        loads[least] += tensors[name].nbytes
        table[name] = least + 1
    return table


def _where(shape: tuple[int, ...], chunks: list[tuple[int, Any]]) -> int | Cut:
    """Return how a manifest says where the chunks of a tensor lie."""
    held = [(number, chunk) for number, chunk in chunks if 0 not in chunk.sizes]
    if not held:  # without elements
        return 1
    for dim, size in enumerate(shape):
        if any(chunk.sizes[dim] != size for _, chunk in held):
            return Cut(dim=dim, chunks=[[number, chunk.offsets[dim], chunk.sizes[dim]] for number, chunk in held])
    return held[0][0]


def _is_of(where: int | Cut, rank: int) -> bool:
    return rank + 1 in ([where] if isinstance(where, int) else [number for number, _, _ in where.chunks])


def _held(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, which is all of it if it has no elements."""
    if not sharded.is_sharded(tensor):
        return tensor
    local = sharded.local_of(tensor)
    return local if tensor.numel() else local.new_empty(tensor.shape)


def _unspread(flat: Flat) -> Flat:
    """Return the state of a world of one, where a DTensor is whole."""
    return Flat(flat.tree, {name: _held(tensor) for name, tensor in flat.tensors.items()})
