"""The save handler for single files: whole or absent, plain values only, and nothing in a file is run."""

import os
import pickle
import resource
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_states import mark_of, marked, same, training_state

from disttrain.checkpoint import DamagedError, DiskSaver, load_file
from disttrain.errors import CheckpointError


def test_torch_reads_the_files_with_weights_only(tmp_path: Path) -> None:
    saver = DiskSaver(tmp_path / "a" / "b")
    saver(training_state(), "state.pt")
    assert os.listdir(tmp_path / "a" / "b") == ["state.pt"]
    read = torch.load(tmp_path / "a" / "b" / "state.pt", weights_only=True)
    assert same(read, training_state())
    assert same(load_file(saver.dirname / "state.pt"), training_state())


def test_a_reader_of_the_old_file_reads_it_to_its_end_while_it_is_replaced(tmp_path: Path) -> None:
    saver = DiskSaver(tmp_path)
    saver(marked(1), "m.pt")
    with (tmp_path / "m.pt").open("rb") as old:
        saver(marked(2), "m.pt")
        assert mark_of(torch.load(old, weights_only=True)) == 1


@pytest.mark.parametrize("atomic", [True, False])
def test_files_are_replaced_and_removed(tmp_path: Path, atomic: bool) -> None:
    saver = DiskSaver(tmp_path, atomic=atomic)
    for step in (1, 2):
        saver(marked(step), "m.pt", {"priority": step})
    assert mark_of(load_file(tmp_path / "m.pt")) == 2
    saver.remove("m.pt")
    saver.remove("m.pt")
    assert os.listdir(tmp_path) == []


def test_a_directory_that_is_absent_or_not_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found none; make it or pass create_dir=True"):
        DiskSaver(tmp_path / "absent", create_dir=False)
    (tmp_path / "notes.txt").write_text("")
    DiskSaver(tmp_path)({}, "old.pt")
    with pytest.raises(ValueError, match=r"expected no \.pt files .*found old\.pt; .*require_empty=False"):
        DiskSaver(tmp_path)
    DiskSaver(tmp_path, require_empty=False)({}, "new.pt")
    with pytest.raises(CheckpointError, match=r"cannot make the directory .*notes\.txt"):
        DiskSaver(tmp_path / "notes.txt" / "x")


@pytest.mark.parametrize("name", ["../x.pt", "/x.pt", "a/x.pt", ".x.pt", ""])
def test_only_plain_names_are_accepted(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="expected a plain file name"):
        DiskSaver(tmp_path)({}, name)


@pytest.mark.parametrize("value", [np.float64(1), {1}, object(), print, torch.nn.Linear(1, 1)])
def test_a_value_that_could_not_be_read_again_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"state\['a'\]\[0\] is a "):
        DiskSaver(tmp_path)(OrderedDict(a=[value]), "x.pt")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("atomic", [True, False])
def test_a_full_disk_is_an_error_and_the_old_file_stays(tmp_path: Path, atomic: bool) -> None:
    saver = DiskSaver(tmp_path, atomic=atomic)
    saver(marked(1), "old.pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
    try:
        with pytest.raises(
            CheckpointError, match=rf"cannot write .*new\.pt: .*it needs {2**22} bytes and \d+ are free"
        ):
            saver({"a": torch.zeros(2**20)}, "new.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert mark_of(load_file(tmp_path / "old.pt")) == 1
    if atomic:
        assert os.listdir(tmp_path) == ["old.pt"]


def test_old_temporary_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    old, young, mine = ".tmp-m.pt-0a1b2c3d", ".tmp-m.pt-0a1b2c3e", ".tmp-mine"
    for name in (old, young, mine):
        (tmp_path / name).write_text("")
    long_ago = time.time() - 2 * 3600
    for name in (old, mine):
        os.utime(tmp_path / name, (long_ago, long_ago))
    DiskSaver(tmp_path)({}, "m.pt")
    assert sorted(os.listdir(tmp_path)) == [young, mine, "m.pt"]


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/disttrain-evil",)


def test_a_strangers_file_runs_nothing(tmp_path: Path) -> None:
    torch.save({"a": Evil()}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("zip.pt", "bare.pt"):
        with pytest.raises(DamagedError, match="holds something else than tensors and plain values"):
            load_file(tmp_path / name)
    assert not Path("/tmp/disttrain-evil").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02", b"garbage" * 100])
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(DamagedError, match=r"x\.pt is damaged"):
        load_file(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*absent\.pt: No such file"):
        load_file(tmp_path / "absent.pt")
