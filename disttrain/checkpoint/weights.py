"""Reads the weights of modules to begin with: from a checkpoint, a safetensors file, or a file of `torch.save`.

*Contract*: nothing is unpickled but tensors and plain values, and the source is not changed: a damaged checkpoint of
another run is not set aside. Of a checkpoint only the modules are read, and no state of an optimizer. Their parameters
are those that the run evaluated, as in an export: an average (`ema`), or the evaluation point of its optimizer.

*Errors*: CheckpointError for a file or a checkpoint that cannot be read, DamagedError for a damaged one; of a
checkpoint the same on every rank.

*Cost*: each rank reads the modules into host memory; all ranks together hash the files of a checkpoint.
"""

import hashlib
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from disttrain.checkpoint.agree import CheckpointRanks, on_every_rank
from disttrain.checkpoint.check import verify
from disttrain.checkpoint.disk_saver import load_file
from disttrain.checkpoint.export_files import INDEX
from disttrain.checkpoint.exports import other_parameters
from disttrain.checkpoint.manifest import MANIFEST, Manifest
from disttrain.checkpoint.state_reader import StateReader
from disttrain.checkpoint.state_tree import restore_state
from disttrain.checkpoint.store import CheckpointStore
from disttrain.checkpoint.tensor_reader import TensorReader
from disttrain.errors import CheckpointError, DamagedError
from disttrain.files import read_json

MODEL = "model"
"""The key of the model in the state of a run."""
_INSIDE = (MODEL, "state_dict")
"""The keys under which files keep the state of a model beside other things."""


class Weights(NamedTuple):
    """The states of modules, by the name of the module, with their origin."""

    modules: dict[str, Mapping[str, Any]]
    """{"model": state_dict, "loss": state_dict, ...}: tensors on the CPU, and what else a module's state holds."""
    sha256: str
    """Of the file; of the checkpoint's manifest, which lists the hashes of all its files; of the files of an index, as
    sha256sum lists them."""
    manifest: Manifest | None = None
    """The manifest of the checkpoint; None for a file."""


def weights_of_checkpoint(
    store: CheckpointStore, name: str, modules: Collection[str], backend: CheckpointRanks
) -> Weights:
    """Verify a checkpoint of any run and read those of `modules` that it holds; every rank calls this."""
    rank, world_size = (backend.rank, backend.world_size) if store.shared else (0, 1)
    with ExitStack() as stack:
        directory = on_every_rank(backend, lambda: stack.enter_context(store.opened(name)))
        manifest = on_every_rank(backend, lambda: verify(directory, rank=rank, world_size=world_size))
        return on_every_rank(backend, lambda: _read(directory, manifest, modules))


def _read(directory: Path, manifest: Manifest, modules: Collection[str]) -> Weights:
    state = manifest.state
    is_run = isinstance(state, dict) and MODEL in state
    trees = {key: state[key] for key in modules if key in state} if is_run else {MODEL: state}
    with StateReader(directory, manifest) as reader:
        read = {key: restore_state(tree, reader.fetch) for key, tree in trees.items()}
        for key in trees if is_run else ():
            point, average = other_parameters(manifest, "evaluated", key)
            if evaluated := restore_state(point if average is None else average, reader.fetch):
                read[key] = {**read[key], **evaluated}
    sha256 = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
    if not is_run:
        read[MODEL] = _state_of_model(read[MODEL], f"the checkpoint {directory}")
    return Weights(read, sha256, manifest)


def weights_of_file(path: Path) -> Weights:
    """Read a safetensors file, the index of several, or a file of `torch.save`.

    The latter holds a state_dict, alone or as "model" or "state_dict".
    """
    if path.name.endswith(INDEX):
        return _weights_of_index(path)
    sha256 = _sha256_of(path)
    if path.suffix == ".safetensors":
        return Weights({MODEL: _tensors_of_file(path)}, sha256)
    return Weights({MODEL: _state_of_model(load_file(path), str(path))}, sha256)


def _weights_of_index(path: Path) -> Weights:
    """Read the files that an index lists, `{"weight_map": {NAME: FILE}}`; they lie beside it."""
    try:
        by_name = read_json(path)["weight_map"]
        files = sorted(set(by_name.values()))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{path} is no index of safetensors files: {type(error).__name__} {error}") from error
    if wrong := [file for file in files if not isinstance(file, str) or Path(file).name != file or not file.strip(".")]:
        raise DamagedError(f"{path} lists {wrong[0]!r}, expected the plain name of a file beside it")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= _tensors_of_file(path.parent / file)
    if missing := [name for name in by_name if name not in tensors]:
        raise DamagedError(f"{path} lists {missing[0]}, which none of its files holds")
    hashes = "".join(f"{_sha256_of(path.parent / file)}  {file}\n" for file in files)
    return Weights({MODEL: tensors}, hashlib.sha256(hashes.encode()).hexdigest())


def _tensors_of_file(path: Path) -> dict[str, Tensor]:
    with TensorReader(path.resolve()) as reader:  # a link is a usual form of a file that a hub keeps
        return reader.fetch_all()


def _sha256_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _state_of_model(content: Any, place: str) -> Mapping[str, Any]:
    """Return the state of a model in the content of a file: the content itself, or what it keeps as "model"."""
    if isinstance(content, Mapping):
        for inside in (content, *(content[key] for key in _INSIDE if isinstance(content.get(key), Mapping))):
            if any(isinstance(value, Tensor) for value in inside.values()):
                return {str(name): value for name, value in inside.items()}
    holds = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
    raise DamagedError(
        f"{place} holds no state of a model: expected names with tensors, alone or as 'model' or 'state_dict', got "
        f"{holds[:200] or 'nothing'}"
    )
