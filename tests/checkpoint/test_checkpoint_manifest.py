"""A manifest describes its checkpoint, and any bytes are read as a manifest or refused with a CheckpointError."""

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.checkpoint import CheckpointInfo, DamagedError, FileRecord, Manifest
from disttrain.checkpoint import manifest as module
from disttrain.checkpoint.manifest import FORMAT, MANIFEST, manifest_bytes, parse_manifest, sums_bytes
from disttrain.errors import CheckpointError

RECORD = FileRecord(size_bytes=3, sha256=hashlib.sha256(b"abc").hexdigest())
POSITION = {
    "epoch": 2,
    "samples": 10**12,
    "fingerprint": "ab",
    "exact": True,
    "share": 0.5,
    "none": None,
    "data": {"length": 5},
}


def example() -> Manifest:
    return Manifest(
        step=40,
        position=POSITION,
        seed=2**63 - 1,
        num_slots=8,
        world_size=2,
        config_sha256="0" * 64,
        versions={"torch": "2.13.0"},
        files={"tensors.safetensors": RECORD},
        state={"lr": 0.1, "betas": {"$tuple": [0.9, 0.999]}},
    )


def test_a_manifest_is_read_as_it_was_written() -> None:
    manifest = parse_manifest(manifest_bytes(example()))
    assert manifest == example()
    assert [type(value) for value in manifest.position.values()] == [int, int, str, bool, float, type(None), dict]


def test_a_manifest_is_json_with_a_field_a_line() -> None:
    lines = manifest_bytes(example()).decode().splitlines()
    assert '"step": 40,' in lines
    assert json.loads("\n".join(lines))["files"]["tensors.safetensors"]["size_bytes"] == 3


def test_sums_are_lines_as_sha256sum_writes_them() -> None:
    data = manifest_bytes(example())
    assert sums_bytes(example().files, data).decode().splitlines() == [
        f"{hashlib.sha256(data).hexdigest()}  MANIFEST.json",
        f"{hashlib.sha256(b'abc').hexdigest()}  tensors.safetensors",
    ]


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "a\\b/c", "a\nb", "a\x00b", "x" * 300, "ä", "a "]
    + ["MANIFEST.json", "SHA256SUMS"],
)
def test_a_file_name_that_could_leave_the_directory_is_refused(name: str) -> None:
    fields = json.loads(manifest_bytes(example()))
    fields["files"] = {name: RECORD.model_dump()}
    with pytest.raises(DamagedError, match=r"MANIFEST\.json"):
        parse_manifest(json.dumps(fields).encode())


def test_a_newer_format_is_an_error_but_not_damage() -> None:
    fields = json.loads(manifest_bytes(example())) | {"format": FORMAT + 1}
    with pytest.raises(CheckpointError, match=f"has format {FORMAT + 1}, this release reads up to {FORMAT}") as caught:
        parse_manifest(json.dumps(fields).encode())
    assert not isinstance(caught.value, DamagedError)


def test_a_field_that_a_later_release_adds_to_this_format_is_ignored() -> None:
    fields = json.loads(manifest_bytes(example())) | {"xxh3": "later"}
    assert parse_manifest(json.dumps(fields).encode()) == example()


def test_a_manifest_too_large_to_be_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(CheckpointError, match="at most 100: put long lists of numbers into tensors"):
        manifest_bytes(example())


@pytest.mark.parametrize("position", [{"a": (1, 2)}, {"a": float("nan")}, {1: 1}, {"a": {1: 2}}, {"a": object()}])
def test_a_position_is_plain_values(position: Any) -> None:
    with pytest.raises(ValueError, match="position"):
        CheckpointInfo(position=position)


def read_or_refuse(data: bytes) -> None:
    try:
        manifest = parse_manifest(data)
    except CheckpointError:
        return
    assert parse_manifest(manifest_bytes(manifest)) == manifest


ANY = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    read_or_refuse(data)


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), end=st.integers(0, 10**6))
@settings(max_examples=300)
def test_a_flipped_bit_or_a_lost_end_is_read_or_refused(at: int, bit: int, end: int) -> None:
    data = bytearray(manifest_bytes(example()))
    data[at % len(data)] ^= 1 << bit
    read_or_refuse(bytes(data))
    read_or_refuse(bytes(data[: end % len(data)]))


@given(field=st.sampled_from(sorted(Manifest.model_fields)), value=ANY)
@settings(max_examples=300)
def test_any_value_of_any_field_is_read_or_refused(field: str, value: Any) -> None:
    read_or_refuse(json.dumps(json.loads(manifest_bytes(example())) | {field: value}).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 5000,
        b'{"format": 1e999}',
        b"\xff",
        b"",
        b'{"format": 1, "step": NaN}',
    ],
)
def test_hostile_json_is_refused(data: bytes) -> None:
    with pytest.raises(DamagedError, match=MANIFEST):
        parse_manifest(data)
