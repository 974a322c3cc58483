"""A microbatch as bytes, from which another rank makes one that gives the same bits.

*Contract*: tensors lie on the CPU afterwards; the step moves them to its device, as those that a loader gives. A dense
tensor that lay on the CPU keeps its place relative to `ALIGNMENT`, on which bits can depend.

*Errors*: whatever pickle raises for an object that it cannot copy.

*Cost*: a copy to bytes and one back.
"""

import io
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from disttrain.parallel.rehearsal import ALIGNMENT, copied_to, keeps_its_place


def packed(microbatch: Any) -> bytes:
    """Return a microbatch as bytes."""
    places = [leaf.data_ptr() % ALIGNMENT if keeps_its_place(leaf) else None for leaf in tree_leaves(microbatch)]
    buffer = io.BytesIO()
    torch.save((places, microbatch), buffer)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    """Return the microbatch of some bytes; each call makes a new one."""
    # Any object, not weights alone: another rank of this run has packed it.
    places, microbatch = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)
    leaves, form = tree_flatten(microbatch)
    pairs = zip(leaves, places, strict=True)
    return tree_unflatten([_at(leaf, place) for leaf, place in pairs], form)


def _at(leaf: Any, place: int | None) -> Any:
    if place is None or not isinstance(leaf, Tensor) or leaf.data_ptr() % ALIGNMENT == place:
        return leaf
    return copied_to(leaf, place)
