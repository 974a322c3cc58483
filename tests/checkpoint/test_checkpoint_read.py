"""Loading: every kind of damage to every file is refused by name, and the newest good one is used."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_children import fork, wait
from checkpoint_states import mark_of, marked
from checkpoint_strangers import rewrite, write_manifest

from disttrain.checkpoint import DamagedError, clean, committed, load, load_newest, rotate, save, verify
from disttrain.checkpoint.manifest import MANIFEST, SUMS, TENSORS
from disttrain.errors import CheckpointError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three checkpoints, of the steps 10, 20 and 30."""
    for step in (10, 20, 30):
        save(tmp_path / "c", step, marked(step))
    return tmp_path / "c"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << (at % 8)
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "first bit": lambda path: flip(path, 0),
    "bit in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "last bit": lambda path: flip(path, path.stat().st_size - 1),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "removed": Path.unlink,
    "another step's": lambda path: path.write_bytes((path.parent.parent / "step-00000020" / path.name).read_bytes()),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a link": lambda path: (path.unlink(), path.symlink_to(path.parent.parent / "step-00000020" / path.name)),
    "a link to the same": lambda path: path.symlink_to(path.rename(path.parent.parent / "elsewhere")),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [MANIFEST, SUMS, TENSORS])
def test_damage_is_refused_named_and_gone_round(
    root: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = root / "step-00000030"
    DAMAGE[damage](bad / name)
    with pytest.raises(DamagedError, match=re.escape(name)):
        verify(bad)
    with pytest.raises(DamagedError, match=re.escape(f"{bad} is damaged: ")):
        load(bad)
    loaded = load_newest(root)
    assert loaded is not None
    assert mark_of(loaded.state) == loaded.manifest.step == 20
    assert loaded.name == "step-00000020"
    [(skipped, reason)] = loaded.skipped
    assert skipped == "step-00000030"
    assert name in reason
    assert f"{bad} is damaged, going back to step 20: {reason}" in caplog.text


def test_every_flipped_bit_of_the_small_files_is_noticed(root: Path) -> None:
    for name in (MANIFEST, SUMS):
        path = root / "step-00000010" / name
        good = path.read_bytes()
        for at in range(0, len(good), 7):
            flip(path, at)
            with pytest.raises(DamagedError):
                verify(path.parent)
            path.write_bytes(good)
    verify(path.parent)


def test_the_damaged_are_set_aside_and_neither_counted_nor_removed(root: Path) -> None:
    DAMAGE["emptied"](root / "step-00000030" / TENSORS)
    DAMAGE["removed"](root / "step-00000020" / MANIFEST)
    loaded = load_newest(root)
    assert loaded is not None
    assert [name for name, _ in loaded.skipped] == ["step-00000030", "step-00000020"]
    assert committed(root) == ["step-00000010"]
    for step in (11, 12, 13):
        save(root, step, marked(step), keep=2)
    assert committed(root) == ["step-00000013", "step-00000012"]
    clean(root)
    aside = sorted(name for name in os.listdir(root) if name.startswith("damaged-"))
    assert [re.sub(r"-\w{8}$", "", name) for name in aside] == ["damaged-00000020", "damaged-00000030"]
    again = load_newest(root)
    assert again is not None
    assert again.skipped == []


def test_where_there_is_none_nothing_is_loaded(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "absent") is None
    (tmp_path / "step-1").mkdir()
    (tmp_path / ".tmp-00000001-0a1b2c3d").mkdir()
    (tmp_path / "step-00000002").write_text("a file")
    assert load_newest(tmp_path) is None


def test_where_none_is_good_it_is_said_each_time_and_nothing_is_moved(root: Path) -> None:
    for name in committed(root):
        DAMAGE["emptied"](root / name / TENSORS)
    before = sorted(os.listdir(root))
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"all checkpoints in .* are damaged.*step-00000030: .*step-00000010: "
        ):
            load_newest(root)
    assert sorted(os.listdir(root)) == before


def test_where_all_that_is_left_was_set_aside_a_run_does_not_begin_anew_by_itself(root: Path) -> None:
    DAMAGE["emptied"](root / "step-00000030" / TENSORS)
    load_newest(root)
    for name in committed(root):
        (root / name).rename(root / f"mine-{name}")
    with pytest.raises(CheckpointError, match=r"damaged-00000030-\w{8}: found before"):
        load_newest(root)


def test_a_directory_under_another_step_is_refused(root: Path) -> None:
    (root / "step-00000030").rename(root / "step-00000040")
    with pytest.raises(DamagedError, match="is of step 30, another than the directory's"):
        verify(root / "step-00000040")
    (root / "step-00000040").rename(root / "best")
    assert verify(root / "best").step == 30


def test_temporaries_and_removals_are_never_read(root: Path) -> None:
    (root / "step-00000030").rename(root / ".del-00000030-0a1b2c3d")
    (root / "step-00000020").rename(root / ".tmp-00000020-0a1b2c3d")
    loaded = load_newest(root)
    assert loaded is not None
    assert loaded.manifest.step == 10
    assert sorted(clean(root)) == [".del-00000030-0a1b2c3d", ".tmp-00000020-0a1b2c3d"]
    assert os.listdir(root) == ["step-00000010"]


def test_a_checkpoint_of_a_newer_format_stops_the_run(root: Path) -> None:
    rewrite(root / "step-00000030", format=99)
    with pytest.raises(CheckpointError, match=r"step-00000030: MANIFEST\.json has format 99") as caught:
        load_newest(root)
    assert not isinstance(caught.value, DamagedError)
    assert len(committed(root)) == 3


def as_nobody(body: Callable[[], None]) -> int:
    """Run `body` in a child without root's right to read everything; return its exit code."""

    def dropped() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        body()

    return wait(fork(dropped))


def test_what_may_not_be_read_stops_the_run() -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        root.chmod(0o755)
        for step in (10, 20):
            save(root, step, marked(step))
        (root / "step-00000020" / TENSORS).chmod(0)

        def body() -> None:
            with pytest.raises(CheckpointError, match="Permission denied; give this user access to it") as caught:
                load_newest(root)
            assert not isinstance(caught.value, DamagedError)

        assert as_nobody(body) == 0
        assert len(committed(root)) == 2


def test_a_directory_that_one_rank_does_not_see_is_not_taken_for_damage(root: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rank 3 finds no directory .*that every rank sees") as caught:
        verify(root / "step-00000031", rank=3, world_size=4)
    assert not isinstance(caught.value, DamagedError)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", ".."])
def test_a_manifest_cannot_name_a_file_outside(root: Path, name: str) -> None:
    secret = b"secret"
    (root / "secret").write_bytes(secret)
    record = {"size_bytes": len(secret), "sha256": hashlib.sha256(secret).hexdigest()}
    manifest = json.loads((root / "step-00000030" / MANIFEST).read_text())
    manifest["files"][name] = record
    write_manifest(root / "step-00000030", json.dumps(manifest).encode())
    with pytest.raises(DamagedError, match=r"MANIFEST\.json is no manifest"):
        verify(root / "step-00000030")


@pytest.mark.parametrize("name", [MANIFEST, SUMS])
def test_a_huge_file_of_plain_values_is_refused_before_it_is_read(root: Path, name: str) -> None:
    path = root / "step-00000030" / name
    os.truncate(path, 2**40)  # a sparse file: takes no room on the disk
    with pytest.raises(DamagedError, match=f"{name} has {2**40} bytes, expected at most"):
        verify(path.parent)


def test_a_tensor_file_that_promises_more_than_it_holds_is_refused(root: Path) -> None:
    header = b'{"model.0.weight":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    rewrite(root / "step-00000030", files={TENSORS: len(header).to_bytes(8, "little") + header + b"xxxx"})
    with pytest.raises(DamagedError, match=r"tensors\.safetensors is no safetensors file"):
        load(root / "step-00000030")


def test_loading_a_strangers_checkpoint_imports_and_runs_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 1, marked(1))
    state = {"a": {"$object": "os.system", "args": ["touch x"]}}
    rewrite(path, state=state)
    with pytest.raises(DamagedError, match="which no release writes so"):
        load(path)


def test_rotation_leaves_what_is_not_a_checkpoint_alone(root: Path) -> None:
    for name in ("step-7", "step-00000007x", "best", "step-000000007", "notes.txt", ".tmp-mine", ".del-00000001-XYZ"):
        (root / name).mkdir()
    before = set(os.listdir(root))
    rotate(root, 2)
    clean(root)
    assert before - set(os.listdir(root)) == {"step-00000010"}


def test_clean_does_not_follow_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    (root / ".tmp-00000001-0a1b2c3d").symlink_to(tmp_path / "mine")
    assert clean(root) == []
    assert (tmp_path / "mine" / "file").read_text() == "precious"
