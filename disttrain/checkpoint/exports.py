"""One safetensors file with the tensors of a model, out of a checkpoint that any number of ranks wrote.

*Contract*: the checkpoint is verified first. The file appears whole and durable or not at all, under the names that
the model's `state_dict` has; a tensor that it has twice is there twice, for the format holds no ties.

*Cost*: memory for the largest tensor; each is read, written and let go.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from disttrain.checkpoint.check import verify
from disttrain.checkpoint.state_reader import StateReader
from disttrain.checkpoint.storage import replacing
from disttrain.checkpoint.stored import dtype_of
from disttrain.checkpoint.tensors import send_tensors
from disttrain.checkpoint.tree import Json, restore
from disttrain.errors import CheckpointError

PART = "model"


class Exported(NamedTuple):
    """What was written."""

    step: int
    num_tensors: int
    size_bytes: int


def export(directory: str | Path, file: str | Path) -> Exported:
    """Write the model's tensors in a checkpoint to the new file `file`; those of all of it if it has no "model"."""
    directory, file = Path(directory), Path(file)
    if file.exists():
        raise CheckpointError(f"{file} is there already; remove it or choose another name")
    manifest = verify(directory)
    tensors, sources = _described(manifest.state)
    if not tensors:
        raise CheckpointError(f"the checkpoint {directory} holds no tensors of a model; see disttrain checkpoint show")
    # One for all: memory that is asked for and freed again and again need not be given back, nor fit the next.
    room = torch.empty(max(tensor.nbytes for tensor in tensors.values()), dtype=torch.uint8)

    def values(name: str) -> Tensor:
        tensor = tensors[name]
        into = room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return reader.read(*sources[name], into)

    with StateReader(directory, manifest) as reader:
        try:
            with replacing(file) as out:
                size_bytes, _ = send_tensors(out, tensors, values)
        except OSError as error:
            raise CheckpointError(f"cannot write {file}: {error.strerror or error}") from error
    return Exported(manifest.step, len(tensors), size_bytes)


def _described(state: Json) -> tuple[dict[str, Tensor], dict[str, tuple[str, str, tuple[int, ...]]]]:
    """Return the tensors, without values, by their path in the model, and how the checkpoint calls them."""
    tensors: dict[str, Tensor] = {}
    sources: dict[str, tuple[str, str, tuple[int, ...]]] = {}

    def note(name: str, dtype: str, shape: tuple[int, ...], path: str) -> Tensor:
        sources[path or name] = (name, dtype, shape)
        tensors[path or name] = torch.empty(shape, dtype=dtype_of(dtype), device="meta")
        return tensors[path or name]

    restore(state[PART] if isinstance(state, dict) and PART in state else state, note)
    return tensors, sources
