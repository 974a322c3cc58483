"""Loading: every kind of damage to every file is refused and named, and the newest good checkpoint is loaded."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_children import fork, wait
from checkpoint_states import flip, mark_of, marked
from checkpoint_strangers import rewrite

from disttrain.checkpoint import (
    DamagedError,
    clean,
    committed,
    load,
    load_from,
    load_newest,
    save,
    store_at,
    verify,
)
from disttrain.checkpoint.manifest import MANIFEST, SUMS, TENSORS
from disttrain.errors import CheckpointError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with checkpoints of the steps 10, 20 and 30."""
    for step in (10, 20, 30):
        save(tmp_path / "c", step, marked(step))
    return tmp_path / "c"


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
def test_damage_is_refused_and_named_and_an_older_one_is_loaded(
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


def test_damaged_ones_are_set_aside_and_neither_counted_nor_removed(root: Path) -> None:
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


def test_without_a_checkpoint_nothing_is_loaded(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "absent") is None
    (tmp_path / "step-1").mkdir()
    (tmp_path / ".tmp-00000001-0a1b2c3d").mkdir()
    (tmp_path / "step-00000002").write_text("a file")
    assert load_newest(tmp_path) is None


def test_without_a_good_one_each_load_is_an_error_and_nothing_is_moved(root: Path) -> None:
    for name in committed(root):
        DAMAGE["emptied"](root / name / TENSORS)
    before = sorted(os.listdir(root))
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"all checkpoints in .* are damaged.*step-00000030: .*step-00000010: "
        ):
            load_newest(root)
    assert sorted(os.listdir(root)) == before


def test_a_run_does_not_begin_anew_if_all_that_is_left_was_set_aside(root: Path) -> None:
    DAMAGE["emptied"](root / "step-00000030" / TENSORS)
    load_newest(root)
    for name in committed(root):
        (root / name).rename(root / f"mine-{name}")
    with pytest.raises(CheckpointError, match=r"damaged-00000030-\w{8}: found damaged before"):
        load_newest(root)


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


def test_a_file_without_permission_stops_the_run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
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


def test_a_tensor_file_that_promises_more_than_it_holds_is_refused(root: Path) -> None:
    header = b'{"model.0.weight":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    rewrite(root / "step-00000030", files={TENSORS: len(header).to_bytes(8, "little") + header + b"xxxx"})
    with pytest.raises(DamagedError, match=r"tensors\.safetensors is not a safetensors file"):
        load(root / "step-00000030")


def test_loading_a_checkpoint_of_a_stranger_imports_and_runs_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 1, marked(1))
    state = {"a": {"$object": "os.system", "args": ["touch x"]}}
    rewrite(path, state=state)
    with pytest.raises(DamagedError, match="no release writes such an object"):
        load(path)


def test_one_checkpoint_of_a_store_is_loaded_by_its_name(root: Path) -> None:
    names = committed(root)
    for name in names:
        found = load_from(store_at(root), name)
        assert (found.name, found.place) == (name, str(root))
        assert mark_of(found.state) == found.manifest.step
    flip(root / names[0] / TENSORS, -1)
    with pytest.raises(DamagedError, match=rf"the checkpoint {root}/{names[0]} is damaged: {TENSORS} does not have"):
        load_from(store_at(root), names[0])
    assert committed(root) == names  # it is not set aside
