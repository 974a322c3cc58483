"""Opens files of weights for `weights.py`: safetensors or files of `torch.save`, one of them or several with an index.

*Contract*: of safetensors only the headers are read until a tensor is asked for, and then the part that is asked for.
Files of `torch.save` are read whole. Nothing is unpickled but tensors and plain values. The ranks that see the very
same file (one host, device, number and time of change) share the work to hash it.

*Errors*: CheckpointError for a file that cannot be read, DamagedError for a damaged one.
"""

import hashlib
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disttrain.checkpoint.agree import CheckpointRanks, by_rank
from disttrain.checkpoint.disk_saver import load_file
from disttrain.checkpoint.export_files import INDEX, SAFETENSORS
from disttrain.checkpoint.state_tree import dtype_name
from disttrain.checkpoint.tensor_reader import TensorReader
from disttrain.errors import CheckpointError, DamagedError
from disttrain.files import read_json

TORCH_INDEX = ".bin.index.json"
"""The end of the name of an index of several files of `torch.save`."""
INDEXES = (INDEX, TORCH_INDEX)
_INSIDE = ("model", "state_dict")
"""The keys under which files keep the state of a model beside other things."""


class WeightFiles:
    """The tensors of one file or of several; `contents` has those of safetensors without values."""

    def __init__(self, path: Path) -> None:
        is_index = path.name.endswith(INDEXES)
        by_name: Mapping[str, str] = read_index(path) if is_index else {}
        self.files = [path.parent / file for file in sorted(set(by_name.values()))] if is_index else [path]
        self._readers: dict[str, TensorReader] = {}
        self.contents: dict[str, Any] = {}
        for file in self.files:
            if file.name.endswith(SAFETENSORS):
                reader = TensorReader(file.resolve())  # a link is a usual form of a file that a hub keeps
                described = reader.described()
                self._readers |= dict.fromkeys(described, reader)
                self.contents |= described
            else:
                _identity(file)  # an error of its own if there is no such file
                self.contents |= state_of_model(load_file(file), str(file))
        if missing := [name for name in by_name if name not in self.contents]:
            raise DamagedError(f"{path} lists {missing[0]}, which none of its files holds")

    def read(self, name: str, sizes: Sequence[int], offsets: Sequence[int]) -> Tensor:
        """Return the box of `sizes` at `offsets` of a tensor of a safetensors file."""
        described = self.contents[name]
        values = torch.empty(tuple(sizes), dtype=described.dtype)
        reader, shape = self._readers[name], tuple(described.shape)
        reader.read(reader.find(name, dtype_name(described.dtype), shape), shape, offsets, values)
        return values

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def sha256(self, backend: CheckpointRanks | None = None) -> str:
        """Return the sha256 of the file, or of the list that `sha256sum` prints of several; every rank calls this."""
        sums = _shared_sums(self.files, backend)
        if len(self.files) == 1:
            return sums[self.files[0].name]
        return hashlib.sha256("".join(f"{sums[f.name]}  {f.name}\n" for f in self.files).encode()).hexdigest()


def read_index(path: Path) -> dict[str, str]:
    """Return the file of each tensor that an index lists, `{"weight_map": {NAME: FILE}}`; they lie beside it."""
    try:
        by_name = dict(read_json(path)["weight_map"])
        files = sorted(set(by_name.values()))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        kind = "safetensors files" if path.name.endswith(INDEX) else "files of torch.save"
        raise DamagedError(f"{path} is no index of {kind}: {type(error).__name__} {error}") from error
    if wrong := [file for file in files if not isinstance(file, str) or Path(file).name != file or not file.strip(".")]:
        raise DamagedError(f"{path} lists {wrong[0]!r}, expected the plain name of a file beside it")
    return by_name


def state_of_model(content: Any, place: str) -> Mapping[str, Any]:
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


def _shared_sums(files: Sequence[Path], backend: CheckpointRanks | None) -> dict[str, str]:
    """Return the sha256 of each file, by name; ranks that see the same file hash it once."""
    seen = by_rank(backend, lambda: {file.name: _identity(file) for file in files})
    rank = 0 if backend is None else backend.rank
    hasher = {}
    for number, file in enumerate(files):
        sharers = [r for r, theirs in enumerate(seen) if theirs.get(file.name) == seen[rank][file.name]]
        hasher[file.name] = sharers[number % len(sharers)]
    mine = [file for file in files if hasher[file.name] == rank]
    sums = by_rank(backend, lambda: {file.name: _sha256_of(file) for file in mine})
    return {name: sums[r][name] for name, r in hasher.items()}


def _identity(path: Path) -> tuple[Any, ...]:
    """Return a key that two ranks share only if they see the same file of one host."""
    try:
        stat = path.stat()
    except OSError as error:
        kind = DamagedError if isinstance(error, FileNotFoundError) else CheckpointError
        raise kind(f"cannot read {path}: {error.strerror or error}") from error
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = boot.read_text().strip() if boot.exists() else socket.gethostname()
    return (host, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _sha256_of(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
