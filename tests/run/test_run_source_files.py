"""The own files of a launch are the cfg.py as it was run and the modules that it has imported, and no others."""

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import disttrain
from disttrain.config import Config, load_config
from disttrain.run import source_files as module
from disttrain.run.source_files import (
    MAX_FILE_BYTES,
    GitState,
    git_changes,
    git_state,
    is_installed,
    package_versions,
    source_files,
)

CFG = """
from torch import nn, optim
import {imports}
from disttrain import Config
config = Config(
    model=nn.Identity, train_data=list, loss=nn.MSELoss(), optimizer=optim.SGD, global_batch_size=8, max_epochs=1
)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty folder; afterwards no module of the test is imported any more."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "mine").mkdir()
    yield tmp_path / "mine"
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        path = folder / f"{name.replace('__in__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def loaded(folder: Path, imports: str) -> Config:
    write(folder, own_cfg=CFG.format(imports=imports))
    return load_config(folder / "own_cfg.py")


def names_of(config: Config) -> set[str]:
    assert config.origin is not None
    return set(source_files(config.origin))


def test_modules_beside_the_cfg_are_found_by_their_names(folder: Path) -> None:
    write(folder, rd_nets="import rd_lib.deep.sub", rd_lib__in____init__="", rd_lib__in__deep__in__sub="X = 1")
    write(folder, rd_unused="")
    config = loaded(folder, "rd_nets")
    assert names_of(config) == {
        "cfg.py",
        "modules/rd_nets.py",
        "modules/rd_lib/__init__.py",
        "modules/rd_lib/deep/sub.py",  # of a namespace package
    }
    write(folder, rd_late="")
    __import__("rd_late")  # as a factory may, when it is called
    assert "modules/rd_late.py" in names_of(config)


def test_installed_modules_and_our_own_are_not_the_users(folder: Path) -> None:
    write(folder, venv__in__lib__in__site_packages__in__rd_installed="")
    (folder / "venv" / "lib" / "site_packages").rename(folder / "venv" / "lib" / "site-packages")
    sys.path.append(str(folder / "venv" / "lib" / "site-packages"))
    assert names_of(loaded(folder, "rd_installed, json, torch")) == {"cfg.py"}
    assert is_installed("disttrain.run.train", disttrain.__file__)
    assert not is_installed("__main__", str(folder / "train.py"))


def test_an_editable_install_elsewhere_is_found(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "src", rd_editable__in____init__="", rd_before="")
    sys.path.append(str(tmp_path / "src"))
    __import__("rd_before")  # a module of the program that loads the config
    assert names_of(loaded(folder, "rd_editable")) == {"cfg.py", "modules/rd_editable/__init__.py"}


def test_the_cfg_is_kept_as_it_was_run(folder: Path) -> None:
    config = loaded(folder, "json")
    text = (folder / "own_cfg.py").read_bytes()
    (folder / "own_cfg.py").write_text("edited while the run goes on")
    assert config.origin is not None
    assert source_files(config.origin)["cfg.py"].content == text


def test_files_that_are_large_or_no_source_are_known_by_their_hash(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    monkeypatch.setattr(module, "MAX_TOTAL_BYTES", 150)
    monkeypatch.setattr(module, "MAX_HASHED_BYTES", 1000)
    write(folder, rd_a="#" * 90, rd_b="#" * 90, rd_large="#" * 101, rd_huge="#" * 1001, rd_gone="")
    config = loaded(folder, "rd_a, rd_b, rd_large, rd_huge, rd_gone")
    (folder / "rd_gone.py").unlink()
    assert config.origin is not None
    files = source_files(config.origin)
    kept = {name: (file.content is not None, bool(file.sha256), file.size_bytes) for name, file in files.items()}
    del kept["cfg.py"]
    assert kept == {
        "modules/rd_a.py": (True, True, 90),
        "modules/rd_b.py": (False, True, 90),
        "modules/rd_large.py": (False, True, 101),
        "modules/rd_huge.py": (False, False, 1001),
    }


def test_names_of_modules_never_leave_their_folder(folder: Path) -> None:
    write(folder, rd_a="")
    config = loaded(folder, "rd_a")
    for name in ("..", "a/../../b", "", "rd\x00"):
        sys.modules[name] = sys.modules["rd_a"]
    modules = ("rd_a", "_/_/_", "a_/_/_/_/_b", "_", "rd_")
    assert names_of(config) == {"cfg.py", *(f"modules/{name}.py" for name in modules)}


def test_versions_are_those_of_imported_packages(folder: Path) -> None:
    write(folder, rd_a="__version__ = '7'")
    config = loaded(folder, "rd_a, torch")
    assert config.origin is not None
    found = package_versions(config.origin)
    torch = __import__("torch")
    assert (found["torch"], found["disttrain"]) == (torch.__version__, disttrain.__version__)
    assert found["python"] == sys.version.split()[0]
    assert "rd_a" not in found
    assert "json" not in found


def git(folder: Path, *words: str) -> None:
    identity = ("-c", "user.name=someone", "-c", "user.email=someone@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True)


def test_the_git_commit_and_whether_tracked_files_differ(folder: Path) -> None:
    assert git_state(folder) is None or git_state(folder) == git_state(folder.parent)
    git(folder, "init")
    assert git_state(folder) is None  # no commit yet
    write(folder, a="1", below__in__b="2")
    git(folder, "add", "a.py")
    git(folder, "commit", "-m", "first")
    head = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    commit = head.stdout.strip()
    assert git_state(folder / "below") == GitState(commit, dirty=False)  # b.py is not tracked
    write(folder, a="changed")
    assert git_state(folder / "below") == GitState(commit, dirty=True)
    assert str(git_state(folder)) == f"{commit[:12]} with changes"
    assert git_state(folder / "absent") is None


def test_the_changes_of_a_dirty_work_tree(folder: Path, tmp_path: Path) -> None:
    """`git apply` gives the files of the launch back, wherever in the repository the cfg.py lies; bounded in size."""
    git(folder, "init")
    write(folder, a="1", below__in__b="2")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    assert git_changes(folder) is None
    write(folder, a="changed", below__in__b="too")
    contents = {path: path.read_bytes() for path in folder.rglob("*.py")}
    diff = git_changes(folder / "below")
    assert diff is not None
    git(folder, "stash")
    assert {path: path.read_bytes() for path in contents} != contents
    (tmp_path / "changes.diff").write_bytes(diff)
    git(folder, "apply", str(tmp_path / "changes.diff"))
    assert {path: path.read_bytes() for path in contents} == contents
    write(folder, a="x" * (MAX_FILE_BYTES + 1))
    assert git_changes(folder) is None
    assert git_changes(tmp_path / "absent") is None
