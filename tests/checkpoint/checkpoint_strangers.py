"""Checkpoints as a stranger would write them, hashes in order, and attacks that change anything in one.

An attack draws what it changes from hypothesis and ends with a load that either works or is a CheckpointError:
anything else that is raised is a finding. `test_checkpoint_fuzz.py` runs each for a second or two, `make soak` longer.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_states import marked
from hypothesis import strategies as st

from disttrain.checkpoint import About, load, save, survey, tensors_of
from disttrain.checkpoint.local import LocalPlace
from disttrain.checkpoint.manifest import MANIFEST, SUMS, Cut, Table, describe, part_name
from disttrain.checkpoint.tree import flatten
from disttrain.errors import CheckpointError


def rewrite(directory: Path, files: dict[str, bytes] | None = None, **fields: Any) -> None:
    """Change a checkpoint as a stranger would who keeps its hashes in order."""
    for name, content in (files or {}).items():
        (directory / name).write_bytes(content)
    manifest = json.loads((directory / MANIFEST).read_text()) | fields
    for name in files or {}:
        content = (directory / name).read_bytes()
        manifest["files"][name] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_manifest(directory, json.dumps(manifest).encode())


def write_manifest(directory: Path, data: bytes) -> None:
    (directory / MANIFEST).write_bytes(data)
    try:
        hashes = {name: record["sha256"] for name, record in json.loads(data)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        hashes = {}
    hashes[MANIFEST] = hashlib.sha256(data).hexdigest()
    lines = [f"{value}  {name}\n" for name, value in sorted(hashes.items())]
    (directory / SUMS).write_text("".join(lines), errors="replace")


ANY = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=5),
        st.sampled_from([2**63, -1, 2**200, "\ud800", "../x", "tensors.safetensors", "0" * 64]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["$tensor", "dtype", "shape", "$int", "$float", "$dict", "$tuple", "$size", "$ordered", "$metadata"]
                + ["$counter", "a"]
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=6,
)


def victim(root: Path) -> Path:
    """Save the checkpoint that is attacked, with a value of every kind in it."""
    return save(root, 1, marked(1, size=4) | {"pair": (1, 2**80), "keys": {1: 2.5}})


def victim_in_two(root: Path) -> Path:
    """Save one whose tensors lie in two files, as two ranks would write it: one of each is whole, two are cut."""
    place, state = LocalPlace(root), marked(1, size=4)
    flat = flatten(state)
    table: Table = {"model.0.weight": Cut(dim=0, chunks=[[2, 3, 1], [1, 0, 3]]), "model.1.weight": 1, "count": 2}
    table["model.2.weight"] = Cut(dim=0, chunks=[[1, 0, 2], [2, 2, 2]])
    parts: list[dict[str, Any]] = [{}, {}]
    for name, where in table.items():
        for number, start, length in [[where, 0, None]] if isinstance(where, int) else where.chunks:
            tensor = flat.tensors[name]
            parts[number - 1][name] = tensor if length is None else tensor[start : start + length]
    upload = place.begin(1)
    names = [part_name(number, 2) for number in (1, 2)]
    files = {name: place.write_part(upload, name, part) for name, part in zip(names, parts, strict=True)}
    return root / place.commit(upload, describe(1, flat.tree, About(), 2, files, table))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all values of a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return `tree` with another value at `path`."""
    if not path:
        return value
    copy = tree.copy()
    copy[path[0]] = put(tree[path[0]], path[1:], value)
    return copy


def load_or_refuse(directory: Path) -> None:
    """Load the checkpoint, and list it as the command line does; only a CheckpointError may come of it."""
    with contextlib.suppress(CheckpointError):
        assert load(directory).manifest.step >= 0
    with contextlib.suppress(CheckpointError):  # of a newer format
        for entry in survey(directory.parent):
            if entry.manifest is not None:
                tensors_of(entry.manifest)


def change_a_value(directory: Path, draw: Callable[..., Any]) -> None:
    """Put any value in the place of any other in the manifest."""
    manifest = json.loads((directory / MANIFEST).read_text())
    place = draw(st.sampled_from(places(manifest)))
    write_manifest(directory, json.dumps(put(manifest, place, draw(ANY))).encode())


def change_the_text(directory: Path, draw: Callable[..., Any]) -> None:
    """Cut the manifest's text, or put other bytes into it."""
    data = (directory / MANIFEST).read_bytes()
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 40)))
    write_manifest(directory, data[:start] + draw(st.binary(max_size=8)) + data[end:])


def any_bytes(directory: Path, draw: Callable[..., Any]) -> None:
    """Put any bytes in the place of the manifest."""
    write_manifest(directory, draw(st.binary(max_size=300)))


def change_the_chunks(directory: Path, draw: Callable[..., Any]) -> None:
    """Say that the tensors lie elsewhere: other files, other places, chunks twice, none, too many."""
    table = json.loads((directory / MANIFEST).read_text())["tensors"]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(table)))
        number = st.integers(-1, 5) | st.sampled_from([2**31, 2**63, 2**200])
        chunks = st.lists(st.tuples(number, number, number).map(list), max_size=4)
        table[name] = draw(number | st.fixed_dictionaries({"dim": number, "chunks": chunks}) | st.just(table[name]))
        if isinstance(table[name], dict) and draw(st.booleans()):
            table[name]["dim"] = 0
    rewrite(directory, tensors=table)


def tensor_file(directory: Path) -> Path:
    return sorted(directory.glob("tensors*.safetensors"))[-1]


def change_the_tensors(directory: Path, draw: Callable[..., Any]) -> None:
    """Put other bytes into the tensor file, its header most of all."""
    data = tensor_file(directory).read_bytes()
    start = draw(st.integers(0, len(data)) | st.integers(0, min(len(data), 400)))
    end = draw(st.integers(start, min(len(data), start + 40)))
    rewrite(directory, files={tensor_file(directory).name: data[:start] + draw(st.binary(max_size=12)) + data[end:]})


def change_the_header(directory: Path, draw: Callable[..., Any]) -> None:
    """Put any value in the place of any other in the tensor file's header."""
    data = tensor_file(directory).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(put(header, draw(st.sampled_from(places(header))), draw(ANY))).encode()
    length = draw(st.sampled_from([len(text), len(text), len(text), len(text) + 1, 0, 2**63, 2**64 - 1, 100_000_001]))
    rewrite(directory, files={tensor_file(directory).name: length.to_bytes(8, "little") + text + data[8 + size :]})


ATTACKS_ON_TWO = (change_the_chunks, change_a_value, change_the_header)
ATTACKS = (change_a_value, change_the_text, any_bytes, change_the_tensors, change_the_header)


def attack(directory: Path, how: Callable[[Path, Callable[..., Any]], None], draw: Callable[..., Any]) -> None:
    """Change the victim, load it, and put it right again."""
    good = {path.name: path.read_bytes() for path in directory.iterdir()}
    try:
        how(directory, draw)
        load_or_refuse(directory)
    finally:
        for name, content in good.items():
            (directory / name).write_bytes(content)
