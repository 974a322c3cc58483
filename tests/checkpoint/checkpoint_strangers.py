"""Checkpoints as a stranger would write them, with the right hashes, and attacks that change one.

An attack draws its change from hypothesis. The checkpoint is then loaded. The load must succeed or raise a
CheckpointError; any other exception is a finding. `test_checkpoint_fuzz.py` runs each attack for a second or two, and
`make soak` runs them longer.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_states import marked
from hypothesis import strategies as st

from disttrain.checkpoint import CheckpointInfo, load, save, survey, tensors_of
from disttrain.checkpoint.local_store import LocalStore
from disttrain.checkpoint.manifest import MANIFEST, SUMS, Cut, Table, manifest_of, part_name
from disttrain.checkpoint.state_tree import flatten
from disttrain.errors import CheckpointError


def rewrite(directory: Path, files: dict[str, bytes] | None = None, **fields: Any) -> None:
    """Change files and fields of a checkpoint, and write the hashes that belong to the change."""
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
    """Save the checkpoint to attack; it has a value of every kind."""
    return save(root, 1, marked(1, size=4) | {"pair": (1, 2**80), "keys": {1: 2.5}})


def victim_in_two(root: Path) -> Path:
    """Save a checkpoint with two files of tensors, as two ranks write it: two tensors are whole, two are cut."""
    store, state = LocalStore(root), marked(1, size=4)
    flat = flatten(state)
    table: Table = {"model.0.weight": Cut(dim=0, chunks=[[2, 3, 1], [1, 0, 3]]), "model.1.weight": 1, "count": 2}
    table["model.2.weight"] = Cut(dim=0, chunks=[[1, 0, 2], [2, 2, 2]])
    parts: list[dict[str, Any]] = [{}, {}]
    for name, entry in table.items():
        for number, start, length in [[entry, 0, None]] if isinstance(entry, int) else entry.chunks:
            tensor = flat.tensors[name]
            parts[number - 1][name] = tensor if length is None else tensor[start : start + length]
    upload = store.begin(1)
    names = [part_name(number, 2) for number in (1, 2)]
    files = {name: store.write_part(upload, name, part) for name, part in zip(names, parts, strict=True)}
    return root / store.commit(upload, manifest_of(1, flat.tree, CheckpointInfo(), 2, files, table))


def value_paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all values of a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(deeper for key, value in inner for deeper in value_paths(value, (*path, key)))]


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return `tree` with another value at `path`."""
    if not path:
        return value
    copy = tree.copy()
    copy[path[0]] = put(tree[path[0]], path[1:], value)
    return copy


def load_or_refuse(directory: Path) -> None:
    """Load the checkpoint, and list it as the command line does; only a CheckpointError may be raised."""
    with contextlib.suppress(CheckpointError):
        assert load(directory).manifest.step >= 0
    with contextlib.suppress(CheckpointError):  # of a newer format
        for entry in survey(directory.parent):
            if entry.manifest is not None:
                tensors_of(entry.manifest)


def change_a_value(directory: Path, draw: Callable[..., Any]) -> None:
    """Replace any value in the manifest by any other."""
    manifest = json.loads((directory / MANIFEST).read_text())
    path = draw(st.sampled_from(value_paths(manifest)))
    write_manifest(directory, json.dumps(put(manifest, path, draw(ANY))).encode())


def change_the_text(directory: Path, draw: Callable[..., Any]) -> None:
    """Cut the text of the manifest, or insert other bytes."""
    data = (directory / MANIFEST).read_bytes()
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 40)))
    write_manifest(directory, data[:start] + draw(st.binary(max_size=8)) + data[end:])


def any_bytes(directory: Path, draw: Callable[..., Any]) -> None:
    """Replace the manifest by any bytes."""
    write_manifest(directory, draw(st.binary(max_size=300)))


def change_the_chunks(directory: Path, draw: Callable[..., Any]) -> None:
    """Change the table: other files, other positions, chunks twice, no chunks, too many chunks."""
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
    """Replace bytes of the tensor file, mostly in its header."""
    data = tensor_file(directory).read_bytes()
    start = draw(st.integers(0, len(data)) | st.integers(0, min(len(data), 400)))
    end = draw(st.integers(start, min(len(data), start + 40)))
    rewrite(directory, files={tensor_file(directory).name: data[:start] + draw(st.binary(max_size=12)) + data[end:]})


def change_the_header(directory: Path, draw: Callable[..., Any]) -> None:
    """Replace any value in the header of the tensor file by any other."""
    data = tensor_file(directory).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(put(header, draw(st.sampled_from(value_paths(header))), draw(ANY))).encode()
    length = draw(st.sampled_from([len(text), len(text), len(text), len(text) + 1, 0, 2**63, 2**64 - 1, 100_000_001]))
    rewrite(directory, files={tensor_file(directory).name: length.to_bytes(8, "little") + text + data[8 + size :]})


ATTACKS_ON_TWO = (change_the_chunks, change_a_value, change_the_header)
ATTACKS = (change_a_value, change_the_text, any_bytes, change_the_tensors, change_the_header)


def attack(directory: Path, how: Callable[[Path, Callable[..., Any]], None], draw: Callable[..., Any]) -> None:
    """Change the victim, load it, and restore its files."""
    good = {path.name: path.read_bytes() for path in directory.iterdir()}
    try:
        how(directory, draw)
        load_or_refuse(directory)
    finally:
        for name, content in good.items():
            (directory / name).write_bytes(content)
