"""Finds and reads the weights that `init_from` names: a checkpoint of another run, which may be under way, or a file.

*Contract*: rank 0 chooses the checkpoint, and all ranks read the same one; nothing there is changed. If the run at
that place removes the checkpoint meanwhile, the choice is made again. Damaged checkpoints are passed over by RUN and
RUN@last alone. A run that was killed before its first checkpoint begins again with the checkpoint with which it began,
not with a newer one.

*Errors*: ConfigError, the same for all ranks, if there are no such weights or if the ranks read different ones.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from disttrain.backend import Backend
from disttrain.checkpoint import (
    Weights,
    is_url,
    on_one_rank,
    step_of,
    store_at,
    weights_of_checkpoint,
    weights_of_file,
)
from disttrain.checkpoint.weight_files import INDEXES
from disttrain.checkpoint.weights import Choose, Chosen, everything
from disttrain.errors import CheckpointError, ConfigError, DamagedError
from disttrain.run.checkpoint_target import find_target, other_place

_WISH = re.compile(r"(.+)@(best|last|[0-9]{1,15})")
WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin")
"""The usual ends of the names of files with weights."""
PRETRAINED_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""The files with the weights of a folder for `from_pretrained`, in the order in which it looks for them."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MOST_TRIES = 8
"""A run under way may remove the chosen checkpoint as often as this before the reading is given up."""


class Begin(NamedTuple):
    """The weights with which a run began, as its files keep it."""

    path: str
    """As `init_from.path` gave it."""
    step: int | None
    """Of the checkpoint; None for a file."""
    sha256: str


class Source(NamedTuple):
    """Weights that were read, and what is to be said about them."""

    weights: Weights
    begin: Begin
    notes: list[str]
    """Warnings: damaged checkpoints that were passed over, another content than when the run began."""


def begin_of(kept: Any) -> Begin | None:
    """Return the `Begin` of what a file keeps; None for anything else."""
    match kept:
        case {"path": str(path), "step": int() | None as step, "sha256": str(sha256)}:
            return Begin(path, step, sha256)
    return None


def read_source(
    path: str, before: Begin | None, modules: Collection[str], backend: Backend, choose: Choose = everything
) -> Source:
    """Read what `choose` asks for of those of `modules` that the weights at `path` hold; every rank calls this.

    `before`: the weights with which this run has begun before; it takes the same checkpoint again.
    """

    def choose_alike(contents: Weights) -> Chosen:
        _same_on_all_ranks(path, contents.sha256, backend)
        return choose(contents)

    before = before if before is not None and before.path == path else None
    place, wish = on_one_rank(backend, lambda: split(path))
    if before is not None and before.step is not None:
        wish = str(before.step)
    if (file := on_one_rank(backend, lambda: file_at(path, place))) is not None:
        source = _from_file(path, file, backend, choose_alike)
    else:
        source = _from_checkpoint(path, place, wish, modules, backend, choose_alike)
    now = source.weights.sha256
    if before is not None and before.sha256 != now:
        source.notes.append(
            f"init_from={path} has another content now: sha256 {now[:12]}, and {before.sha256[:12]} when this run "
            "began before"
        )
    return source


def _same_on_all_ranks(path: str, sha256: str, backend: Backend) -> None:
    by_rank: list[str] = backend.all_gather(sha256)
    with backend.agree("comparing the weights of init_from"):
        for rank, other in enumerate(by_rank):
            if other != by_rank[0]:
                raise ConfigError(
                    f"init_from={path}: the ranks read different weights there: sha256 {by_rank[0][:12]} on rank 0, "
                    f"{other[:12]} on rank {rank}; expected the same on every host"
                )


def split(path: str) -> tuple[str, str]:
    """Return the place and the wish of RUN@WISH: "best", "last", a step, or "" for none. A path that exists is none."""
    match = _WISH.fullmatch(path)
    if match is None or (not is_url(path) and Path(path).exists()):
        return path, ""
    return match[1], match[2]


def file_at(path: str, place: str) -> str | None:
    """Return the file that is meant, which may lie in a folder; None for checkpoints; ConfigError for nothing."""
    if is_url(place):
        if place.endswith((*WEIGHT_FILES, *INDEXES)):
            raise ConfigError(f"init_from={path}: expected a folder of checkpoints behind the URL; copy the file here")
        return None
    if Path(place).is_dir():
        found = None if place != path else weights_in(Path(place))
        return None if found is None else str(found)
    if place != path or not Path(path).is_file():
        raise ConfigError(
            f"init_from={path}: expected a run directory, a folder of checkpoints, or a file of weights; there is no "
            f"{'directory' if Path(place).exists() else 'file or directory'} {place}, seen from {Path.cwd()}"
            + ("; a model of the Hugging Face Hub has to be downloaded first" if _HUB_ID.fullmatch(path) else "")
        )
    return path


def weights_in(folder: Path) -> Path | None:
    """Return the file with the weights of a folder that `from_pretrained` loads; None if it is another folder."""
    if (folder / "checkpoints").is_dir() or any(step_of(each.name) is not None for each in folder.iterdir()):
        return None
    return next((folder / name for name in PRETRAINED_FILES if (folder / name).is_file()), None)


def _from_file(path: str, file: str, backend: Backend, choose: Choose) -> Source:
    try:
        weights = weights_of_file(Path(file), backend, choose)
    except DamagedError as error:
        raise ConfigError(f"init_from={path}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"init_from={path}: {error}") from error
    return Source(weights, Begin(path, None, weights.sha256), [])


def _from_checkpoint(
    path: str, place: str, wish: str, modules: Collection[str], backend: Backend, choose: Choose
) -> Source:
    """Read the checkpoint that is wished for; choose again if it is removed meanwhile."""
    damaged: dict[str, str] = {}
    for _ in range(_MOST_TRIES):
        root, name = on_one_rank(backend, lambda: _choose(path, place, wish, damaged))
        store = store_at(root)
        try:
            weights = weights_of_checkpoint(store, name, modules, backend, choose)
        except CheckpointError as error:  # the same on every rank
            if name not in on_one_rank(backend, store.committed):
                continue
            if not isinstance(error, DamagedError):
                raise CheckpointError(f"init_from={path}: cannot read {store.path(name)}: {error}") from error
            if wish not in ("", "last"):
                raise ConfigError(f"init_from={path}: the checkpoint {store.path(name)} is damaged: {error}") from error
            damaged[name] = str(error)
            continue
        assert weights.manifest is not None
        notes = [f"init_from={path}: checkpoint {name} is damaged: {reason}" for name, reason in damaged.items()]
        return Source(weights, Begin(path, weights.manifest.step, weights.sha256), notes)
    raise ConfigError(f"init_from={path}: its checkpoints were removed as fast as they were found; wait for that run")


def _choose(path: str, place: str, wish: str, damaged: Collection[str]) -> tuple[str, str]:
    """Return the store and the name of the checkpoint; on rank 0."""
    step = int(wish) if wish.isdecimal() else None
    other = other_place(place)
    try:
        store, name, _ = find_target(place, step, best=wish == "best")
    except ConfigError as error:
        if other is None:
            raise ConfigError(f"init_from={path}: {error}") from error
        raise _elsewhere(path, place, other, wish) from error
    if other is not None and step is None:  # a newer one, or a better one, may lie there
        raise _elsewhere(path, place, other, wish)
    if name is None:
        good = [each for each in store.committed() if each not in damaged]
        if not good:
            found = "only damaged ones" if damaged else "none"
            hint = "" if is_url(place) else _files_in(Path(place))
            raise ConfigError(f"init_from={path}: expected a checkpoint in {store}, found {found}{hint}")
        name = good[0]
    return str(store), name


def _files_in(folder: Path) -> str:
    """Return a hint at files of weights in a folder, such as one of the Hugging Face Hub; empty without."""
    names = sorted(each.name for each in folder.iterdir() if each.name.endswith((*WEIGHT_FILES, *INDEXES)))
    names.sort(key=lambda name: not name.endswith(INDEXES))
    return f"; name a file in it: init_from={folder / names[0]}" if names else ""


def _elsewhere(path: str, place: str, other: str, wish: str) -> ConfigError:
    return ConfigError(
        f"init_from={path}: the run {place} names {other} as the place of its checkpoints, which is not opened because "
        f"a run directory says so; use init_from={other}{'@' * bool(wish)}{wish}"
    )
