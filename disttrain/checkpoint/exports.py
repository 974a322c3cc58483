"""Writes the tensors of a model from a checkpoint that any number of ranks wrote, in a form that other programs read.

| form          | what is written                                                                                    |
|---------------|----------------------------------------------------------------------------------------------------|
| `safetensors` | one file; a tensor with two names is in it twice, for the format holds no ties                       |
| `hf`          | a folder for `from_pretrained` of transformers: config.json, generation_config.json, the safetensors |
| `torch`       | one file of `torch.save`: a state_dict, read by `torch.load(weights_only=True)`; ties stay ties      |

*Contract*: the checkpoint is verified first, and no model is built. The file or the folder appears whole and durable,
or not at all. The tensors have the names of the model's `state_dict`. The parameters are by default those that the run
evaluated: of the optimizer's evaluation point, if it has one, or the average of the weights (`ema`), if that was
evaluated. Buffers are the model's.

*Cost*: memory for the largest tensor, and its copy if `dtype` differs; the tensors are read and written one after
another. `torch` holds the whole model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from disttrain.checkpoint.check import verify
from disttrain.checkpoint.export_files import write_in_shards, write_one, write_pretrained, write_torch
from disttrain.checkpoint.manifest import Manifest
from disttrain.checkpoint.state_reader import StateReader
from disttrain.checkpoint.state_tree import Json, dtype_name, restore_state
from disttrain.checkpoint.tensor_reader import dtype_of
from disttrain.errors import CheckpointError

_MODEL = "model"
"""The key of the model in a state."""
EVALUATION_POINT = "evaluation_point"
"""The key of the model's parameters at the optimizer's evaluation point, in the state of a run that has one."""

LEFT_OUT = "frozen_left_out"
"""The key of a position: {name: sha256} of the frozen parameters that the checkpoint does not hold, as `model.NAME`."""

PRETRAINED = "pretrained"
"""The key of a position: {module: its description} of the models of transformers in a run's model, by their place in
it; "" is the model itself. A description has "architecture", "config", and where there are any "generation_config" and
"tied", the names that `from_pretrained` ties to others."""

ExportWeights = Literal["evaluated", "trained", "ema"]
"""The parameters to export: those that the run evaluated, those that it trains, or their moving average."""
ExportForm = Literal["safetensors", "hf", "torch"]
"""The form of an export: this module's table."""
EXPORT_DTYPES = ("float32", "bfloat16", "float16", "float64")
"""The dtypes into which an export may convert floating-point numbers."""
HF_SHARD_BYTES = 5 * 10**9
"""The size beyond which a folder for transformers has its tensors in several files, unless another one is asked for."""


class Exported(NamedTuple):
    """The result of an export."""

    step: int
    num_tensors: int
    size_bytes: int
    """Of all files with tensors."""
    evaluation_point: bool = False
    """Whether the parameters are those of the optimizer's evaluation point, and not those that it trains."""
    num_left_out: int = 0
    """The frozen tensors that the checkpoint, and so the file, leaves out."""
    average: bool = False
    """Whether the parameters are the moving average of those that are trained."""
    num_files: int = 1
    """The files with tensors."""


@dataclass
class ModelTensors:
    """The tensors of a model in a checkpoint, by name: without values, and (name, dtype, shape) there."""

    described: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, tuple[str, str, tuple[int, ...]]] = field(default_factory=dict)


def export(
    directory: str | Path,
    file: str | Path,
    weights: ExportWeights = "evaluated",
    *,
    form: ExportForm = "safetensors",
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    module: str = "",
) -> Exported:
    """Write the tensors of the model in a checkpoint to the new file or folder `file`; all if it has no "model".

    `dtype`: the dtype of all floating-point tensors, such as "bfloat16"; None leaves each as it is.
    `max_shard_bytes`: the size beyond which safetensors are written in several files with an index.
    `module`: export this module of the model alone, under its own names.

    *Errors*: CheckpointError if the file is there, for a checkpoint without a model, and for weights="ema" without one.
    """
    directory, file = Path(directory), Path(file)
    if file.exists() and not (form == "hf" and file.is_dir() and not any(file.iterdir())):
        raise CheckpointError(f"{file} is there already; remove it or choose another name")
    manifest = verify(directory)
    point, average = other_parameters(manifest, weights)
    if weights == "ema" and average is None:
        raise CheckpointError(f"the checkpoint {directory} holds no average of the weights: its run has no ema.decay")
    found = _model_tensors(manifest.state, point if average is None else average)
    if not found.described:
        raise CheckpointError(f"the checkpoint {directory} holds no tensors of a model; see disttrain checkpoint show")
    left_out = _left_out_under(manifest, module)
    found = _of_module(found, module)
    description = _description(directory, manifest, module, left_out) if form == "hf" else {}
    found = _converted(_without_ties(found, description.get("tied", [])), dtype)
    files: list[tuple[str, int]]
    with _values(directory, manifest, found) as (fetch, fetch_alone):
        try:
            if form == "hf":
                limit = max_shard_bytes or HF_SHARD_BYTES
                files = write_pretrained(file, found.described, fetch, description, limit)
            elif form == "torch":
                files = write_torch(file, found.described, fetch_alone)
            elif max_shard_bytes is not None:
                files = write_in_shards(file, found.described, fetch, max_shard_bytes)
            else:
                files = write_one(file, found.described, fetch)
        except OSError as error:
            raise CheckpointError(f"cannot write {file}: {error.strerror or error}") from error
    size_bytes = sum(size for _, size in files)
    counted = len(found.described), size_bytes, point is not None, len(left_out), average is not None
    return Exported(manifest.step, *counted, len(files))


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


def _model_tensors(state: Json, instead: Json) -> ModelTensors:
    """Return the tensors of the model; the parameters of `instead`, if it is not None, come in place of the model's."""
    found = ModelTensors()

    def add(name: str, dtype: str, shape: tuple[int, ...], path: str) -> Tensor:
        found.stored[path or name] = (name, dtype, shape)
        found.described[path or name] = torch.empty(shape, dtype=dtype_of(dtype), device="meta")
        return found.described[path or name]

    restore_state(state[_MODEL] if isinstance(state, dict) and _MODEL in state else state, add)
    if instead is not None:
        restore_state(instead, add)  # in the place of the parameters of the same names
    return found


def _of_module(found: ModelTensors, module: str) -> ModelTensors:
    """Return the tensors of one module of the model, under the names that they have in it."""
    if not module:
        return found
    prefix = f"{module}."
    names = [name for name in found.described if name.startswith(prefix)]
    if not names:
        places = sorted({name.partition(".")[0] for name in found.described})
        raise CheckpointError(f"the model has no module {module} with tensors; its first modules are {places[:8]}")
    here = {name.removeprefix(prefix): name for name in names}
    described = {short: found.described[name] for short, name in here.items()}
    return ModelTensors(described, {short: found.stored[name] for short, name in here.items()})


def _without_ties(found: ModelTensors, tied: list[str]) -> ModelTensors:
    """Return the tensors without those names in `tied` whose tensor stays under another name."""
    others = {found.stored[name] for name in found.stored if name not in tied}
    names = [name for name in found.described if name not in tied or found.stored[name] not in others]
    return ModelTensors({n: found.described[n] for n in names}, {n: found.stored[n] for n in names})


def _converted(found: ModelTensors, dtype: str | None) -> ModelTensors:
    """Return the tensors with every floating-point one described as of `dtype`."""
    if dtype is None:
        return found
    if dtype not in EXPORT_DTYPES:
        raise CheckpointError(f"expected a dtype of {', '.join(EXPORT_DTYPES)}, got {dtype}")
    wanted = dtype_of(dtype)
    described = {n: each.to(wanted) if each.is_floating_point() else each for n, each in found.described.items()}
    return ModelTensors(described, found.stored)


@contextmanager
def _values(
    directory: Path, manifest: Manifest, found: ModelTensors
) -> Iterator[tuple[Callable[[str], Tensor], Callable[[str], Tensor]]]:
    """Yield two functions that read a tensor by name: into memory that the next one reuses, and into memory of its own.

    The second returns one tensor for all names of a tie.
    """
    alone: dict[object, Tensor] = {}
    # One buffer for all: memory that is freed and allocated again might not be returned, or might not fit the next.
    buffer = torch.empty(0, dtype=torch.uint8)

    def fetch(name: str) -> Tensor:
        nonlocal buffer
        _, dtype, shape = found.stored[name]
        size = found.described[name].numel() * dtype_of(dtype).itemsize
        if size > len(buffer):
            buffer = torch.empty(max(map(_stored_bytes, found.stored.values())), dtype=torch.uint8)
        values = buffer[:size].view(dtype_of(dtype)).view(shape)
        return _as(found.described[name].dtype, reader.read(*found.stored[name], values), name)

    def fetch_alone(name: str) -> Tensor:
        stored = found.stored[name]
        if stored not in alone:
            values = torch.empty(stored[2], dtype=dtype_of(stored[1]))
            alone[stored] = _as(found.described[name].dtype, reader.read(*stored, values), name)
        return alone[stored]

    with StateReader(directory, manifest) as reader:
        yield fetch, fetch_alone


def _stored_bytes(stored: tuple[str, str, tuple[int, ...]]) -> int:
    return torch.empty(stored[2], dtype=dtype_of(stored[1]), device="meta").nbytes


def _as(dtype: torch.dtype, values: Tensor, name: str) -> Tensor:
    """Return the values as `dtype`; CheckpointError if a finite number becomes infinite."""
    if values.dtype == dtype:
        return values
    converted = values.to(dtype)
    if not bool(torch.equal(converted.isfinite(), values.isfinite())):
        raise CheckpointError(
            f"{name} holds numbers beyond those of {dtype_name(dtype)}, which would become infinite; use bfloat16"
        )
    return converted


def _left_out_under(manifest: Manifest, module: str) -> list[str]:
    """Return the names of the frozen tensors of a module that the checkpoint leaves out."""
    left_out = manifest.position.get(LEFT_OUT)
    prefix = f"{_MODEL}.{module}." if module else ""
    return [name for name in left_out if name.startswith(prefix)] if isinstance(left_out, dict) else []


def _description(directory: Path, manifest: Manifest, module: str, left_out: list[str]) -> dict[str, Any]:
    """Return the description of the model of transformers that is to be exported."""
    kept: Any = manifest.position.get(PRETRAINED)
    by_place: Mapping[str, Any] = kept if isinstance(kept, dict) else {}
    if left_out:
        raise CheckpointError(
            f"the checkpoint {directory} leaves {len(left_out)} frozen weights out, which from_pretrained would not "
            "find; save one with checkpoint.leave_out_frozen=false, or export the others by --format safetensors"
        )
    description: Any = by_place.get(module)
    match description:
        case {"architecture": str(), "config": dict()}:
            return dict(description)
    places = [place for place in by_place if place]
    advice = (
        f"choose a module that is one: --module {places[0]}" + f", of {', '.join(places)}" * (len(places) > 1)
        if places
        else "use --format safetensors"
    )
    whole = f"module {module}" if module else "model"
    raise CheckpointError(
        f"the checkpoint {directory} describes no model of transformers: its {whole} is none, has adapters of peft, or "
        f"was saved by an older release; {advice}"
    )
