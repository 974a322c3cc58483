"""MANIFEST.json and SHA256SUMS: the description of a checkpoint, and the hashes that guard it.

*Contract*: the same checkpoint gives the same manifest, byte for byte: no times, no host names. SHA256SUMS follows from
the manifest and holds the manifest's own hash, so each of the two guards the other. `sha256sum -c SHA256SUMS` checks a
checkpoint without this package.

*Errors*: a manifest that no release wrote is a DamagedError. One of a newer format is a CheckpointError.
"""

import hashlib
import json
import platform
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError

from disttrain.checkpoint.state_tree import Json
from disttrain.errors import CheckpointError, DamagedError
from disttrain.version import __version__

FORMAT = 2
"""2: the tensors lie in several files, one from each rank that wrote. A single file still has format 1."""
MANIFEST = "MANIFEST.json"
SUMS = "SHA256SUMS"
TENSORS = "tensors.safetensors"
MAX_STEP = 10**15 - 1
MAX_MANIFEST_BYTES = 64 * 2**20
"""The largest manifest that is written, or read into memory; long lists of numbers belong in a tensor."""

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
"""A plain name, without a separator or a leading dot, so it cannot leave the directory."""
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class CheckpointInfo(BaseModel):
    """Facts about the run that wrote a checkpoint, besides the state; all of them are optional."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    position: dict[str, JsonValue] = {}
    """The position of the run: epoch, step in epoch, samples seen, global batch size, fingerprint of the data."""
    seed: int | None = None
    num_slots: Annotated[int, Field(ge=1)] | None = None
    config_sha256: Sha256 | None = None
    config: dict[str, JsonValue] = {}
    """The fields of the config that a run which takes this checkpoint must have too, by dotted name."""


class FileRecord(BaseModel):
    """The size and the hash of one file."""

    model_config = ConfigDict(frozen=True, strict=True)

    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class Cut(BaseModel):
    """A tensor that is cut along one dimension, with its chunks in several files."""

    model_config = ConfigDict(frozen=True, strict=True)

    dim: Annotated[int, Field(ge=0)]
    chunks: list[Annotated[list[int], Field(min_length=3, max_length=3)]]
    """[number of the file, start, length] for each chunk, in any order; start and length count along `dim`."""


class Manifest(CheckpointInfo):
    """The content of MANIFEST.json."""

    format: Annotated[int, Field(ge=1, le=FORMAT)] = 1
    step: Annotated[int, Field(ge=0, le=MAX_STEP)]
    world_size: Annotated[int, Field(ge=1)] = 1
    versions: dict[str, str] = {}
    """The versions of disttrain, torch and python that wrote it."""
    files: dict[FileName, FileRecord]
    tensors: dict[str, int | Cut] | None = None
    """The table of format 2: the number of each tensor's file, from 1, or its cut."""
    state: Any = None
    """The tree of plain values, with references to the tensors (see `state_tree`)."""


def part_name(number: int, num_files: int) -> str:
    """Return the name of the tensor file `number`, from 1."""
    return TENSORS if num_files == 1 else f"tensors-{number:05d}-of-{num_files:05d}.safetensors"


Table = dict[str, int | Cut]
"""The number of each tensor's file, or its cut."""


def manifest_of(
    step: int,
    tree: Json,
    info: CheckpointInfo,
    world_size: int,
    files: dict[str, FileRecord],
    tensors: Table | None = None,
) -> Manifest:
    """Return the manifest of a flattened state; CheckpointError if a manifest cannot hold it."""
    versions = {"disttrain": __version__, "torch": str(torch.__version__), "python": platform.python_version()}
    rest: dict[str, Any] = {} if tensors is None else {"format": FORMAT, "tensors": tensors}
    try:
        return Manifest(
            **dict(info), step=step, world_size=world_size, versions=versions, files=files, state=tree, **rest
        )
    except ValidationError as error:
        raise CheckpointError(f"the manifest of step {step} cannot be written: {_first_problem(error)}") from error


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the content of MANIFEST.json."""
    fields = manifest.model_dump(exclude={"state"} if manifest.tensors is not None else {"state", "tensors"})
    # One field a line, so that a person can read it and `grep` finds a field.
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in fields.items()]
    lines.append(f'"state": {json.dumps(manifest.state, allow_nan=False)}')
    data = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"the plain values of the state take {len(data)} bytes as JSON; at most {MAX_MANIFEST_BYTES}: "
            "put long lists of numbers into tensors"
        )
    return data


def parse_manifest(data: bytes) -> Manifest:
    """Return the manifest that `manifest_bytes` wrote."""
    try:
        fields: Json = json.loads(data.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is not JSON: {error}") from error
    if not isinstance(fields, dict) or type(fields.get("format")) is not int:
        raise DamagedError(f"{MANIFEST} is not a manifest of a checkpoint: it has no format number")
    if fields["format"] > FORMAT:
        raise CheckpointError(
            f"{MANIFEST} has format {fields['format']}, this release reads up to {FORMAT}: "
            f"use the release that wrote it ({str(fields.get('versions'))[:200]}) or a newer one"
        )
    if fields["format"] == 1:
        fields.pop("tensors", None)
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        raise DamagedError(f"{MANIFEST} is not a manifest of a checkpoint: {_first_problem(error)}") from error
    if reserved := {MANIFEST, SUMS} & set(manifest.files):
        raise DamagedError(f"{MANIFEST} lists {sorted(reserved)} among the files")
    if manifest.format > 1:
        parts = {part_name(number, len(manifest.files)) for number in range(1, len(manifest.files) + 1)}
        if manifest.tensors is None or set(manifest.files) != parts:
            raise DamagedError(f"{MANIFEST} of format {manifest.format} lists no tensors, or not the files of one save")
    return manifest


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def _first_problem(error: ValidationError) -> str:
    """Return the first problem of a validation, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))[:200]}: {first['msg']}"


def sums_bytes(files: dict[str, FileRecord], manifest: bytes) -> bytes:
    """Return the content of SHA256SUMS, given that of MANIFEST.json."""
    hashes = {name: record.sha256 for name, record in files.items()}
    hashes[MANIFEST] = hashlib.sha256(manifest).hexdigest()
    return "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()
