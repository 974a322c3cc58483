"""Kept launches are read back; damaged ones, and a stranger's, count as absent and lead to nowhere."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from disttrain.run.launches import (
    KeptLaunch,
    LaunchRecord,
    is_same_launch,
    keep_launch,
    launch_before,
    read_launches,
    record_files,
)
from disttrain.run.source_files import SourceFile


def own(**texts: str) -> dict[str, SourceFile]:
    files = {}
    for key, text in texts.items():
        name = "cfg.py" if key == "cfg" else f"modules/{key}.py"
        files[name] = SourceFile(f"/x/{key}.py", len(text), hashlib.sha256(text.encode()).hexdigest(), text.encode())
    return files


def record_of(files: dict[str, SourceFile], step: int = 0, **changes: Any) -> LaunchRecord:
    return LaunchRecord(step=step, files=record_files(files), **changes)


def keep(run: Path, files: dict[str, SourceFile], step: int = 0, **changes: Any) -> int:
    before = read_launches(run / "launches", run / "cfg.py")
    return keep_launch(run / "launches", record_of(files, step, **changes), files, before)


def read(run: Path) -> list[KeptLaunch]:
    return read_launches(run / "launches", run / "cfg.py")


def test_launches_are_kept_and_read_back(tmp_path: Path) -> None:
    first, second = own(cfg="one", nets="a"), own(cfg="two", nets="a")
    assert keep(tmp_path, first, command=["python"], built={"optimizer": {"lr": 0.1}}) == 1
    assert keep(tmp_path, second, step=7, versions={"torch": "2.9"}) == 2
    kept = read(tmp_path)
    assert [(each.number, each.record.step) for each in kept] == [(1, 0), (2, 7)]
    assert kept[0].record == record_of(first, command=["python"], built={"optimizer": {"lr": 0.1}})
    assert [each.content("cfg.py") for each in kept] == [b"one", b"two"]
    assert [each.content("modules/nets.py") for each in kept] == [b"a", b"a"]
    assert kept[0].content("modules/absent.py") is None
    assert os.path.samefile(*(each.folder / "modules" / "nets.py" for each in kept))  # it takes no further space
    assert sorted(os.listdir(tmp_path / "launches")) == ["0001", "0002"]


def test_the_same_launch_again_adds_nothing(tmp_path: Path) -> None:
    files = own(cfg="one", nets="a")
    for step in (0, 5, 9):
        assert keep(tmp_path, files, step=step, time=f"at {step}", world_size=step + 1) == 1
    assert [each.record.step for each in read(tmp_path)] == [0]


@pytest.mark.parametrize(
    "changes",
    [
        {"commit": "b" * 40},
        {"dirty": True},
        {"command": ["python", "more"]},
        {"overrides": ["seed=2"]},
        {"versions": {"torch": "2.10", "numpy": "2"}},
        {"built": {"optimizer": {"lr": 0.2}}},
    ],
)
def test_a_launch_with_anything_else_is_another_one(changes: dict[str, Any]) -> None:
    files = own(cfg="one")
    base: dict[str, Any] = {"commit": "a" * 40, "versions": {"torch": "2.9", "rich": "1"}}
    assert not is_same_launch(record_of(files, **base), record_of(files, **(base | changes)))
    assert not is_same_launch(record_of(files, **base), record_of(own(cfg="two"), **base))
    assert not is_same_launch(record_of(files, **base), record_of(own(cfg="one", nets=""), **base))
    late = {"versions": {"torch": "2.9", "tensorboard": "2"}}  # imported late
    assert is_same_launch(record_of(files, **base), record_of(files, **(base | late)))


def test_the_launch_that_saved_a_step_is_the_newest_that_began_before(tmp_path: Path) -> None:
    for number, step in enumerate((0, 100, 100, 250)):
        keep(tmp_path, own(cfg=str(number)), step=step)
    kept = read(tmp_path)
    found = {step: launch_before(kept, step) for step in (0, 1, 100, 101, 250, 300)}
    assert {step: each and each.number for step, each in found.items()} == {
        0: None,
        1: 1,
        100: 1,  # the two that began at 100 have not saved it
        101: 3,
        250: 3,
        300: 4,
    }


def test_a_run_of_an_older_release_has_its_cfg_as_the_first_launch(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    (tmp_path / "cfg.py").write_text("old")
    [old] = read(tmp_path)
    assert (old.number, old.content("cfg.py"), old.record.knows_modules) == (0, b"old", False)
    assert keep(tmp_path, own(cfg="new"), step=6) == 2
    assert [each.content("cfg.py") for each in read(tmp_path)] == [b"old", b"new"]
    assert not read(tmp_path)[0].record.knows_modules


def test_a_cut_off_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "launches" / ".tmp-0001").mkdir(parents=True)
    (tmp_path / "launches" / ".tmp-0001" / "cfg.py").write_text("half")
    (tmp_path / "launches" / "notes").write_text("a person's")
    assert keep(tmp_path, own(cfg="one")) == 1
    assert sorted(os.listdir(tmp_path / "launches")) == ["0001", "notes"]


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[" * 100_000,
        "[]",
        '{"step": "0"}',
        '{"step": -1}',
        '{"step": 0, "format": 2}',
        '{"step": 0, "files": {"../../secret": {"path": "", "size_bytes": 0, "sha256": "", "kept": true}}}',
        '{"step": 0, "files": {"modules/../../a.py": {"path": "", "size_bytes": 0, "sha256": "", "kept": true}}}',
        '{"step": 0, "versions": {"torch": 1}}',
    ],
)
def test_a_damaged_launch_counts_as_absent_and_its_number_is_not_used_again(tmp_path: Path, damage: str) -> None:
    for number in range(2):
        keep(tmp_path, own(cfg=str(number)))
    (tmp_path / "launches" / "0002" / "launch.json").write_text(damage)
    assert [each.number for each in read(tmp_path)] == [1]
    assert keep(tmp_path, own(cfg="new")) == 3


def test_what_was_changed_or_lies_elsewhere_is_no_content_of_a_launch(tmp_path: Path) -> None:
    keep(tmp_path, own(cfg="one", nets="a"))
    [launch] = read(tmp_path)
    (launch.folder / "cfg.py").write_text("edited")
    assert launch.content("cfg.py") is None
    (tmp_path / "secret").write_text("a")
    (launch.folder / "modules" / "nets.py").unlink()
    (launch.folder / "modules" / "nets.py").symlink_to(tmp_path / "secret")
    assert launch.content("modules/nets.py") is None
    listed = json.loads((launch.folder / "launch.json").read_text())["files"]
    assert set(listed) == {"cfg.py", "modules/nets.py"}
