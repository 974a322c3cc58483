"""DTensors: the part of one that this rank holds, and a DTensor made from the part that a rank has read.

*Contract*: a checkpoint holds DTensors that are replicated, or cut along one dimension. This module does not
communicate. It imports torch's DTensor only once a program has one: that import takes more than half a second.

*Errors*: any other placement is a CheckpointError that names the path in the state.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from disttrain.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

MeshPlacements = tuple["DeviceMesh", Sequence["Placement"]]
"""The ranks over which a DTensor is spread, and its placement along each dimension of their mesh."""

DTensorPlan = Callable[[str, tuple[int, ...]], MeshPlacements | None]
"""(dotted path in the state, shape) -> the mesh and placements of that tensor; None for a whole one on each rank."""


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # a program that has not imported it has no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Any) -> Tensor:
    """Return the part of a DTensor that this rank holds."""
    local: Tensor = tensor.detach().to_local()
    return local


def check_dtensor(tensor: Any, path: str) -> Tensor:
    """Return the DTensor without its graph; CheckpointError if a checkpoint cannot hold it."""
    from torch.distributed.tensor import Replicate, Shard

    if odd := [placement for placement in tensor.placements if type(placement) not in (Shard, Replicate)]:
        raise CheckpointError(f"{path} is a DTensor placed as {odd[0]}; expected Shard or Replicate: redistribute it")
    if len(dims := {placement.dim for placement in tensor.placements if placement.is_shard()}) > 1:
        raise CheckpointError(f"{path} is a DTensor cut along the dimensions {sorted(dims)}; expected one dimension")
    local = local_part(tensor)
    if type(local) not in (Tensor, nn.Parameter) or local.layout != torch.strided or local.is_quantized:
        raise CheckpointError(f"{path} is a DTensor of {type(local).__name__}; expected dense, plain tensors in it")
    if local.is_meta:
        raise CheckpointError(f"{path} is a DTensor on the meta device, without values; materialize the model first")
    detached: Tensor = tensor.detach()
    return detached


def dtensor_identity(tensor: Any) -> tuple[Any, ...]:
    """Return a key that two DTensors share only if they are the same numbers in the same memory, on every rank alike.

    A device without addresses gives a new key for each tensor.
    """
    local = local_part(tensor)
    address = local.untyped_storage().data_ptr()  # an empty part has one too, for FSDP pads its storage
    if address == 0:
        return (object(),)
    layout = (tensor.dtype, tensor.shape, tensor.placements, tensor.device_mesh)
    return (local.device, address, local.storage_offset(), local.stride(), *layout)


def placement_text(tensor: Any) -> str:
    """Return the mesh and the placements of a DTensor, the same text on every rank; "" for any other tensor."""
    if not is_dtensor(tensor):
        return ""
    return f"{tuple(tensor.device_mesh.mesh.shape)} {[str(placement) for placement in tensor.placements]}"


def local_box(spread: MeshPlacements, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes and the offsets of the part that this rank holds of a tensor of `shape`."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = spread
    sizes, offsets = compute_local_shape_and_global_offset(torch.Size(shape), mesh, list(placements))
    return tuple(sizes), tuple(offsets)


def dtensor_from_local(local: Tensor, spread: MeshPlacements, shape: tuple[int, ...]) -> Tensor:
    """Return the DTensor of which this rank holds the part `local`; the part goes to the device of the mesh."""
    from torch.distributed.tensor import DTensor

    mesh, placements = spread
    stride = torch.empty(shape, device="meta").stride()
    with torch.no_grad():
        tensor: Tensor = DTensor.from_local(
            local, mesh, list(placements), run_check=False, shape=torch.Size(shape), stride=stride
        )
    return tensor
