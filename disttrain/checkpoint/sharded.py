"""DTensors: what a rank holds of one, and one made of what a rank has read.

*Contract*: a checkpoint holds DTensors that are replicated, or cut along one dimension. Nothing here communicates,
and torch's DTensors are imported only where there is one: that costs more than half a second.

*Errors*: any other placement is a CheckpointError that names the path.
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

Spec = tuple["DeviceMesh", Sequence["Placement"]]
"""Over which ranks a tensor is spread, and how."""

Sharded = Callable[[str, tuple[int, ...]], Spec | None]
"""(dotted path in the state, shape) -> how that tensor is to be spread over the ranks; None for a whole one on each."""


def is_sharded(tensor: Tensor) -> bool:
    """Return whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Any) -> Tensor:
    """Return what this rank holds of a DTensor."""
    local: Tensor = tensor.detach().to_local()
    return local


def checked(tensor: Any, path: str) -> Tensor:
    """Return the DTensor without its graph; CheckpointError where a checkpoint cannot hold it."""
    from torch.distributed.tensor import Replicate, Shard

    if odd := [placement for placement in tensor.placements if type(placement) not in (Shard, Replicate)]:
        raise CheckpointError(f"{path} is a DTensor placed as {odd[0]}; expected Shard or Replicate: redistribute it")
    if len(cut := {placement.dim for placement in tensor.placements if placement.is_shard()}) > 1:
        raise CheckpointError(f"{path} is a DTensor cut along the dimensions {sorted(cut)}; expected one of them")
    local = local_of(tensor)
    if type(local) not in (Tensor, nn.Parameter) or local.layout != torch.strided or local.is_quantized:
        raise CheckpointError(f"{path} is a DTensor of {type(local).__name__}; expected dense, plain tensors in it")
    if local.is_meta:
        raise CheckpointError(f"{path} is a DTensor on the meta device, without values; materialize the model first")
    detached: Tensor = tensor.detach()
    return detached


def identity(tensor: Any) -> tuple[Any, ...]:
    """Return what two DTensors have in common only if they are the same numbers, on every rank alike."""
    local = local_of(tensor)
    address = local.untyped_storage().data_ptr()  # also an empty part has one: FSDP pads its storage
    if address == 0:
        return (object(),)
    layout = (tensor.dtype, tensor.shape, tensor.placements, tensor.device_mesh)
    return (local.device, address, local.storage_offset(), local.stride(), *layout)


def described(tensor: Any) -> str:
    """Return in a word how a tensor is placed, the same on every rank; nothing for one that is no DTensor."""
    if not is_sharded(tensor):
        return ""
    return f"{tuple(tensor.device_mesh.mesh.shape)} {[str(placement) for placement in tensor.placements]}"


def part_of(spec: Spec, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the sizes and the offsets of what this rank holds of a tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = spec
    sizes, offsets = compute_local_shape_and_global_offset(torch.Size(shape), mesh, list(placements))
    return tuple(sizes), tuple(offsets)


def from_part(local: Tensor, spec: Spec, shape: tuple[int, ...]) -> Tensor:
    """Return the DTensor of which this rank holds `local`; it goes to the device of the mesh."""
    from torch.distributed.tensor import DTensor

    mesh, placements = spec
    stride = torch.empty(shape, device="meta").stride()
    with torch.no_grad():
        made: Tensor = DTensor.from_local(
            local, mesh, list(placements), run_check=False, shape=torch.Size(shape), stride=stride
        )
    return made
