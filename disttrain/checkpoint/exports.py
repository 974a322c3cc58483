"""Writes the tensors of a model as one safetensors file, from a checkpoint that any number of ranks wrote.

*Contract*: the checkpoint is verified first. The file appears whole and durable, or not at all. The tensors have the
names of the model's `state_dict`. A tensor with two names is in the file twice, for the format holds no ties. The
parameters are by default those that the run evaluated: of the optimizer's evaluation point, if it has one, or the
average of the weights (`ema`), if that was evaluated. Buffers are the model's.

*Cost*: memory for the largest tensor; the tensors are read and written one after another.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from disttrain.checkpoint.check import verify
from disttrain.checkpoint.manifest import Manifest
from disttrain.checkpoint.state_reader import StateReader
from disttrain.checkpoint.state_tree import Json, restore_state
from disttrain.checkpoint.storage import replacing
from disttrain.checkpoint.tensor_reader import dtype_of
from disttrain.checkpoint.tensor_writer import send_tensors
from disttrain.errors import CheckpointError

_MODEL = "model"
"""The key of the model in a state."""
EVALUATION_POINT = "evaluation_point"
"""The key of the model's parameters at the optimizer's evaluation point, in the state of a run that has one."""

LEFT_OUT = "frozen_left_out"
"""The key of a position: {name: sha256} of the frozen parameters that the checkpoint does not hold, as `model.NAME`."""


ExportWeights = Literal["evaluated", "trained", "ema"]
"""The parameters to export: those that the run evaluated, those that it trains, or their moving average."""


class Exported(NamedTuple):
    """The result of an export."""

    step: int
    num_tensors: int
    size_bytes: int
    evaluation_point: bool = False
    """Whether the parameters are those of the optimizer's evaluation point, and not those that it trains."""
    num_left_out: int = 0
    """The frozen tensors that the checkpoint, and so the file, leaves out."""
    average: bool = False
    """Whether the parameters are the moving average of those that are trained."""


def export(directory: str | Path, file: str | Path, weights: ExportWeights = "evaluated") -> Exported:
    """Write the tensors of the model in a checkpoint to the new file `file`; all tensors if it has no "model".

    *Errors*: CheckpointError if the file is there, for a checkpoint without a model, and for weights="ema" without one.
    """
    directory, file = Path(directory), Path(file)
    if file.exists():
        raise CheckpointError(f"{file} is there already; remove it or choose another name")
    manifest = verify(directory)
    point, average = other_parameters(manifest, weights)
    if weights == "ema" and average is None:
        raise CheckpointError(f"the checkpoint {directory} holds no average of the weights: its run has no ema.decay")
    tensors, stored = _model_tensors(manifest.state, point if average is None else average)
    if not tensors:
        raise CheckpointError(f"the checkpoint {directory} holds no tensors of a model; see disttrain checkpoint show")
    # One buffer for all: memory that is freed and allocated again might not be returned, or might not fit the next.
    buffer = torch.empty(max(tensor.nbytes for tensor in tensors.values()), dtype=torch.uint8)

    def read_values(name: str) -> Tensor:
        tensor = tensors[name]
        values = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return reader.read(*stored[name], values)

    with StateReader(directory, manifest) as reader:
        try:
            with replacing(file) as out:
                size_bytes, _ = send_tensors(out, tensors, read_values)
        except OSError as error:
            raise CheckpointError(f"cannot write {file}: {error.strerror or error}") from error
    left_out = manifest.position.get(LEFT_OUT)
    num_left_out = len(left_out) if isinstance(left_out, dict) else 0
    return Exported(manifest.step, len(tensors), size_bytes, point is not None, num_left_out, average is not None)


def other_parameters(manifest: Manifest, weights: ExportWeights, module: str = _MODEL) -> tuple[Json, Json]:
    """Return the parameters to take in place of those that are trained: of the evaluation point, and the average.

    `module`: the module of the run, by name; only the model has an evaluation point.
    """
    state: Any = manifest.state
    if weights == "trained" or not isinstance(state, dict) or _MODEL not in state:
        return None, None
    match manifest.position.get("ema"), state.get("kept"):
        case {"evaluate": evaluate}, {"ema": dict(shadows)} if evaluate or weights == "ema":
            prefix = f"{module}."
            return None, {name.removeprefix(prefix): s for name, s in shadows.items() if name.startswith(prefix)}
    return state.get(EVALUATION_POINT) if module == _MODEL else None, None


def _model_tensors(state: Json, instead: Json) -> tuple[dict[str, Tensor], dict[str, tuple[str, str, tuple[int, ...]]]]:
    """Return two dicts by the path in the model: tensors without values, and (name, dtype, shape) in the checkpoint.

    The parameters of `instead`, if it is not None, come in place of the model's.
    """
    tensors: dict[str, Tensor] = {}
    stored: dict[str, tuple[str, str, tuple[int, ...]]] = {}

    def add(name: str, dtype: str, shape: tuple[int, ...], path: str) -> Tensor:
        stored[path or name] = (name, dtype, shape)
        tensors[path or name] = torch.empty(shape, dtype=dtype_of(dtype), device="meta")
        return tensors[path or name]

    restore_state(state[_MODEL] if isinstance(state, dict) and _MODEL in state else state, add)
    if instead is not None:
        restore_state(instead, add)  # in the place of the parameters of the same names
    return tensors, stored
