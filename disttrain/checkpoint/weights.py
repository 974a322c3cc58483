"""Reads the weights of modules to begin with: from a checkpoint, a safetensors file, or a file of `torch.save`.

*Contract*: nothing is unpickled but tensors and plain values, and the source is not changed: a damaged checkpoint of
another run is not set aside. Of a checkpoint only the modules are read, and no state of an optimizer. Their parameters
are those that the run evaluated, as in an export: an average (`ema`), or the evaluation point of its optimizer. A
caller sees the contents first, tensors without values, and says what is to be read: a tensor that is cut over the ranks
is read only as far as this rank holds it.

*Errors*: CheckpointError for a file or a checkpoint that cannot be read, DamagedError for a damaged one; the same on
every rank.

*Cost*: memory for what is read. All ranks together hash the files, once on each host.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disttrain.checkpoint import dtensors
from disttrain.checkpoint.agree import CheckpointRanks, on_every_rank
from disttrain.checkpoint.check import verify
from disttrain.checkpoint.dtensors import MeshPlacements
from disttrain.checkpoint.exports import other_parameters
from disttrain.checkpoint.manifest import MANIFEST, Manifest
from disttrain.checkpoint.state_reader import StateReader
from disttrain.checkpoint.state_tree import Json, restore_state
from disttrain.checkpoint.store import CheckpointStore
from disttrain.checkpoint.tensor_reader import dtype_of
from disttrain.checkpoint.weight_files import WeightFiles, state_of_model
from disttrain.errors import CheckpointError

MODEL = "model"
"""The key of the model in the state of a run."""


class Weights(NamedTuple):
    """The states of modules, by the name of the module, with their origin."""

    modules: dict[str, Mapping[str, Any]]
    """{"model": state_dict, "loss": state_dict, ...}: tensors on the CPU, and what else a module's state holds."""
    sha256: str
    """Of the file; of the checkpoint's manifest, which lists the hashes of all its files; of the files of an index, as
    sha256sum lists them."""
    manifest: Manifest | None = None
    """The manifest of the checkpoint; None for a file."""


Chosen = Mapping[str, Mapping[str, MeshPlacements | None]]
"""For each module the names that are to be read, each with the mesh and the placements of its DTensor; None: whole."""
Choose = Callable[[Weights], Chosen]
"""(contents, in which tensors have no values yet) -> what is to be read; every rank calls it at the same point."""


def everything(contents: Weights) -> Chosen:
    """Choose every tensor, whole."""
    return {part: dict.fromkeys(state) for part, state in contents.modules.items()}


def weights_of_checkpoint(
    store: CheckpointStore,
    name: str,
    modules: Collection[str],
    backend: CheckpointRanks | None,
    choose: Choose = everything,
) -> Weights:
    """Verify a checkpoint of any run and read what is chosen of those of `modules` that it holds; every rank calls."""
    shares = store.shared and backend is not None
    rank, world_size = (backend.rank, backend.world_size) if shares and backend is not None else (0, 1)
    with ExitStack() as stack:
        directory = on_every_rank(backend, lambda: stack.enter_context(store.opened(name)))
        manifest = on_every_rank(backend, lambda: verify(directory, rank=rank, world_size=world_size))
        found = on_every_rank(backend, lambda: stack.enter_context(_Stored(directory, manifest, modules)))
        sha256 = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
        contents = Weights(found.contents, sha256, manifest)
        chosen = choose(contents)
        return contents._replace(modules=on_every_rank(backend, lambda: _read(contents, chosen, found.fetch)))


def weights_of_file(path: Path, backend: CheckpointRanks | None = None, choose: Choose = everything) -> Weights:
    """Read what is chosen of a safetensors file, a file of `torch.save`, or the index of several; every rank calls."""
    with ExitStack() as stack:
        files = on_every_rank(backend, lambda: stack.enter_context(closing(WeightFiles(path))))
        contents = Weights({MODEL: files.contents}, files.sha256(backend))

        def fetch(part: str, name: str, spread: MeshPlacements | None) -> Tensor:
            shape = tuple(files.contents[name].shape)
            sizes, offsets = (shape, (0,) * len(shape)) if spread is None else dtensors.local_box(spread, shape)
            values = files.read(name, sizes, offsets)
            return values if spread is None else dtensors.dtensor_from_local(values, spread, shape)

        chosen = choose(contents)
        return contents._replace(modules=on_every_rank(backend, lambda: _read(contents, chosen, fetch)))


def _read(
    contents: Weights, chosen: Chosen, fetch: Callable[[str, str, MeshPlacements | None], Tensor]
) -> dict[str, Mapping[str, Any]]:
    """Return the chosen part of the contents, with its values."""
    read: dict[str, Mapping[str, Any]] = {}
    for part, names in chosen.items():
        state: dict[str, Any] = {}
        for name, spread in names.items():
            value = contents.modules[part][name]
            if not isinstance(value, Tensor):
                state[name] = value
            else:
                state[name] = fetch(part, name, spread) if value.is_meta else _cut(value, spread)
        read[part] = state
    return read


def _cut(tensor: Tensor, spread: MeshPlacements | None) -> Tensor:
    """Return a tensor that was read whole, or the DTensor of it of which this rank holds a copy of its part."""
    if spread is None:
        return tensor
    shape = tuple(tensor.shape)
    part = tensor
    for dim, (size, offset) in enumerate(zip(*dtensors.local_box(spread, shape), strict=True)):
        part = part.narrow(dim, offset if size else 0, size)
    return dtensors.dtensor_from_local(part.clone(), spread, shape)


class _Stored:
    """The states of modules in a verified checkpoint; a context. `contents` has their tensors without values."""

    def __init__(self, directory: Path, manifest: Manifest, modules: Collection[str]) -> None:
        self._where: dict[str, dict[str, tuple[str, str, tuple[int, ...]]]] = {}
        self._spread: MeshPlacements | None = None
        self._reader = StateReader(directory, manifest, lambda path, shape: self._spread)
        self.contents: dict[str, Mapping[str, Any]] = {}
        state = manifest.state
        if not isinstance(state, dict) or MODEL not in state:  # of a loop of one's own
            read = restore_state(state, self._reader.fetch)
            self.contents[MODEL] = state_of_model(read, f"the checkpoint {directory}")
            return
        for key in [key for key in modules if key in state]:
            point, average = other_parameters(manifest, "evaluated", key)
            instead = point if average is None else average
            # In the place of the parameters of the same names.
            self.contents[key] = {**self._described(key, state[key]), **(self._described(key, instead) or {})}

    def _described(self, part: str, tree: Json) -> Any:
        """Return the state of a module: its tensors without values, and whatever lies deeper in it with its values."""
        where = self._where.setdefault(part, {})
        inner = tree.get("$ordered", tree) if isinstance(tree, dict) else {}
        plain = {name for name, item in inner.items() if isinstance(item, dict) and "$tensor" in item}

        def describe(name: str, dtype: str, shape: tuple[int, ...], path: str) -> Tensor:
            if path not in plain:
                return self._reader.fetch(name, dtype, shape, path)
            where[path] = name, dtype, shape
            try:
                return torch.empty(shape, dtype=dtype_of(dtype), device="meta")
            except RuntimeError as error:  # such as 2^62 x 2^62
                raise CheckpointError(f"cannot hold {name}, {dtype} of shape {list(shape)}: {error}") from error

        return restore_state(tree, describe)

    def fetch(self, part: str, name: str, spread: MeshPlacements | None) -> Tensor:
        """Return a tensor, or the DTensor of it of which only this rank's part is read."""
        self._spread = spread
        return self._reader.fetch(*self._where[part][name])

    def __enter__(self) -> "_Stored":
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.__exit__(None, None, None)
