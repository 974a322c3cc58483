"""A changed byte, a wrong name or a wrong size is damage that names the file; a file that is not seen is not."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from checkpoint_states import flip
from checkpoint_strangers import victim_in_two, write_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.checkpoint import DamagedError, save, verify
from disttrain.checkpoint.check import cannot_read, check_size, check_small
from disttrain.checkpoint.manifest import MANIFEST, MAX_MANIFEST_BYTES, SUMS
from disttrain.errors import CheckpointError


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A checkpoint of step 30, with two tensors."""
    return save(tmp_path / "c", 30, {"a": torch.arange(5), "b": torch.ones(2, 2)})


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_flipped_bit_of_any_file_is_damage(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.getbasetemp() / "flipped"
    path = root / "step-00000001" if root.exists() else victim_in_two(root)
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    content = file.read_bytes()
    changed = bytearray(content)
    changed[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(changed)
    try:
        with pytest.raises(DamagedError, match=r"MANIFEST\.json|SHA256SUMS|tensors-0000[12]-of-00002"):
            verify(path)
    finally:
        file.write_bytes(content)
    assert verify(path).step == 1


def test_every_flipped_bit_of_the_small_files_is_noticed(good: Path) -> None:
    for name in (MANIFEST, SUMS):
        path = good / name
        content = path.read_bytes()
        for position in range(0, len(content), 7):
            flip(path, position)
            with pytest.raises(DamagedError):
                verify(path.parent)
            path.write_bytes(content)
    verify(path.parent)


def test_a_directory_under_another_step_is_refused(good: Path) -> None:
    renamed = good.rename(good.parent / "step-00000040")
    with pytest.raises(DamagedError, match=r"MANIFEST\.json is of step 30, but its directory is named step-00000040"):
        verify(renamed)
    assert verify(renamed.rename(good.parent / "best")).step == 30


def test_a_directory_that_one_rank_does_not_see_is_not_taken_for_damage(good: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rank 3 finds no directory .*that every rank sees") as caught:
        verify(good.parent / "step-00000031", rank=3, world_size=4)
    assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", ".."])
def test_a_manifest_cannot_name_a_file_outside(good: Path, name: str) -> None:
    secret = b"secret"
    (good.parent / "secret").write_bytes(secret)
    record = {"size_bytes": len(secret), "sha256": hashlib.sha256(secret).hexdigest()}
    manifest = json.loads((good / MANIFEST).read_text())
    manifest["files"][name] = record
    write_manifest(good, json.dumps(manifest).encode())
    with pytest.raises(DamagedError, match=r"MANIFEST\.json is not a manifest"):
        verify(good)


@pytest.mark.parametrize("name", [MANIFEST, SUMS])
def test_a_huge_file_of_plain_values_is_refused_before_it_is_read(good: Path, name: str) -> None:
    path = good / name
    os.truncate(path, 2**40)  # a sparse file, which takes no space on the disk
    with pytest.raises(DamagedError, match=f"{name} has {2**40} bytes, expected at most"):
        verify(path.parent)


def test_each_file_is_hashed_by_one_rank_and_its_size_checked_by_all(tmp_path: Path) -> None:
    path = victim_in_two(tmp_path)
    files = sorted(path.glob("tensors-*"))
    for number, file in enumerate(files):
        content = file.read_bytes()
        flip(file, len(content) - 1)
        for rank in range(3):  # the third rank has no file to hash
            if rank == number:
                with pytest.raises(DamagedError, match=f"{file.name} does not have the sha256"):
                    verify(path, rank=rank, world_size=3)
            else:
                assert verify(path, rank=rank, world_size=3).step == 1
        assert verify(path, hashes=False).step == 1
        file.write_bytes(content[:-1])
        for rank in range(3):
            with pytest.raises(DamagedError, match=f"has {len(content) - 1} bytes, expected {len(content)}"):
                verify(path, rank=rank, world_size=3, hashes=False)
        file.write_bytes(content)


def test_only_errors_of_the_file_itself_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "f"
    missing, on_disk, denied = FileNotFoundError(2, "No such file"), OSError(5, "I/O error"), OSError(13, "Denied")
    assert [type(cannot_read(path, error)) for error in (missing, on_disk, denied)] == [
        DamagedError,
        DamagedError,
        CheckpointError,
    ]


def test_the_largest_manifest_is_accepted_and_a_larger_one_is_not() -> None:
    check_small(MANIFEST, MAX_MANIFEST_BYTES)
    check_size(MANIFEST, 3, 3)
    with pytest.raises(DamagedError, match=f"expected at most {MAX_MANIFEST_BYTES}"):
        check_small(MANIFEST, MAX_MANIFEST_BYTES + 1)
