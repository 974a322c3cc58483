"""The modules of a past launch are imported as the run keeps them, if one of them has changed."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from disttrain.config import Origin
from disttrain.errors import ConfigError
from disttrain.run.kept_code import LaunchCode, is_same_code, launch_code
from disttrain.run.launches import KeptLaunch, LaunchRecord, keep_launch, read_launches, record_files
from disttrain.run.source_files import SourceFile, source_files

NAMES = ("kept_single", "kept_package", "kept_package.part", "kept_package.late")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder with a module and a package, which can be imported; afterwards all is forgotten."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kept_single.py").write_text("VALUE, PLACE = 1, __file__\n")
    package = tmp_path / "kept_package"
    package.mkdir()
    (package / "__init__.py").write_text("VALUE = 1\n")
    (package / "part.py").write_text("from kept_package import VALUE as OTHER\n")
    (package / "late.py").write_text("VALUE = 1\n")
    before = list(sys.meta_path)
    yield tmp_path
    sys.meta_path[:] = before
    for name in NAMES:
        sys.modules.pop(name, None)


def launched(folder: Path, contents: dict[str, bytes | None] | None = None) -> KeptLaunch:
    """Import the modules and keep the launch, as a run does."""
    before = frozenset(sys.modules)
    for name in NAMES[:3]:
        importlib.import_module(name)
    origin = Origin(folder / "cfg.py", "cfg", (), folder, b"config = 1\n", before)
    files: dict[str, SourceFile] = source_files(origin)
    for name, content in (contents or {}).items():
        files[name] = files[name]._replace(content=content)
    launches = folder / "launches"
    keep_launch(launches, LaunchRecord(step=0, commit="a" * 40, files=record_files(files)), files, [])
    return read_launches(launches, folder / "cfg.py")[-1]


def imported(code: LaunchCode, name: str) -> object:
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    with code.imported():
        return importlib.import_module(name)


def test_unchanged_modules_are_imported_from_where_they_lie(folder: Path) -> None:
    code = launch_code(launched(folder))
    assert (code.changed, code.modules) == ([], {})


def test_changed_modules_are_imported_as_they_were(folder: Path) -> None:
    """With the path that they had, and without a trace on the disk; the package's other modules are those of now."""
    launch = launched(folder)
    (folder / "kept_single.py").write_text("VALUE, PLACE = 2, __file__\n")
    (folder / "kept_package" / "__init__.py").write_text("VALUE = 2\n")
    code = launch_code(launch)
    assert sorted(code.changed) == ["kept_package", "kept_single"]
    files = {path for path in folder.rglob("*") if path.suffix != ".pyc"}
    single = imported(code, "kept_single")
    assert single.VALUE == 1  # type: ignore[attr-defined]
    assert str(folder / "kept_single.py") == single.PLACE  # type: ignore[attr-defined]
    assert imported(code, "kept_package").VALUE == 1  # type: ignore[attr-defined]
    with code.imported():
        assert importlib.import_module("kept_package.part").OTHER == 1
        assert importlib.import_module("kept_package.late").VALUE == 1
    assert {path for path in folder.rglob("*") if path.suffix != ".pyc"} == files


def test_after_the_context_the_modules_of_now_are_found(folder: Path) -> None:
    launch = launched(folder)
    (folder / "kept_single.py").write_text("VALUE = 22\n")
    finders = list(sys.meta_path)
    assert imported(launch_code(launch), "kept_single").VALUE == 1  # type: ignore[attr-defined]
    assert sys.meta_path == finders


def test_a_module_that_is_gone(folder: Path) -> None:
    launch = launched(folder)
    (folder / "kept_single.py").unlink()
    assert imported(launch_code(launch), "kept_single").VALUE == 1  # type: ignore[attr-defined]


def test_a_changed_module_without_a_kept_copy_is_refused(folder: Path) -> None:
    launch = launched(folder, {"modules/kept_single.py": None})
    assert launch_code(launch).changed == []
    (folder / "kept_single.py").write_text("VALUE = 2\n")
    with pytest.raises(
        ConfigError, match=r"kept_single.py has changed since launch 1, .* at the git commit aaaaaaaaaaaa"
    ):
        launch_code(launch)


def test_the_same_code(folder: Path) -> None:
    launch = launched(folder)
    same = KeptLaunch(launch.folder, 2, launch.record.model_copy(update={"step": 9, "world_size": 4}))
    other = KeptLaunch(launch.folder, 3, launch.record.model_copy(update={"overrides": ["seed=1"]}))
    assert is_same_code(launch, same)
    assert not is_same_code(launch, other)
    fewer = {name: file for name, file in launch.record.files.items() if "part" not in name}
    late = KeptLaunch(launch.folder, 4, launch.record.model_copy(update={"files": fewer, "overrides": ["max_steps=9"]}))
    assert is_same_code(launch, late)
    edited = {name: file.model_copy(update={"sha256": "0"}) for name, file in fewer.items()}
    assert not is_same_code(late, KeptLaunch(launch.folder, 5, launch.record.model_copy(update={"files": edited})))
