"""The sides of a bisection: what --against may be, how each is computed, and that a work tree is removed."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from replayed_runs import run_in, write_code

from disttrain.commands.bisect_sides import Side, described, import_folders, newest_launch, sides_of
from disttrain.errors import ConfigError
from disttrain.run.directory import RunDirectory
from disttrain.run.launches import KeptFile, KeptLaunch, LaunchRecord

pytestmark = pytest.mark.usefixtures("torch_settings")


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, check=True, text=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of a cfg.py in a folder of a git repository."""
    root = tmp_path_factory.mktemp("repository")
    folder = root / "inside"
    folder.mkdir()
    write_code(folder)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "begin")
    with pytest.MonkeyPatch.context() as patch:
        return run_in(folder, patch, "max_steps=4")


def test_a_commit_is_checked_out_and_removed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = run.parents[2]
    commit = git(root, "rev-parse", "HEAD")
    with ExitStack() as stack:
        mine, other = sides_of(str(run), "HEAD", stack)
        assert (mine.words, mine.cfg) == ([], None)
        assert other.label == f"commit {commit[:12]}"
        assert other.cfg is not None
        assert other.cfg.read_text() == (root / "inside" / "small.py").read_text()
        assert other.cfg.parts[-2:] == ("inside", "small.py")
        assert len(git(root, "worktree", "list").splitlines()) == 2
    assert not other.cfg.exists()
    assert len(git(root, "worktree", "list").splitlines()) == 1
    assert git(root, "status", "--porcelain", "--untracked-files=no") == ""


def test_a_cfg_an_interpreter_and_a_run(run: Path, tmp_path: Path) -> None:
    cfg = write_code(tmp_path, name="other.py")
    with ExitStack() as stack:
        assert sides_of(str(run), str(cfg), stack)[1] == Side(str(cfg), str(run), words=["--config", str(cfg)], cfg=cfg)
        assert sides_of(str(run), sys.executable, stack)[1] == Side(sys.executable, str(run), sys.executable)
        assert sides_of(str(run), str(run), stack)[1] == Side(str(run), str(run))


@pytest.mark.parametrize(
    ("against", "message"),
    [
        (
            "no-such-commit",
            "expected a cfg.py, a run directory, a Python interpreter, or a commit of the git repository",
        ),
        ("absent.py", "--against absent.py: no such file; expected a cfg.py"),
        ("--upload-pack=x", "got none of these"),
        ("ls", "got none of these"),
    ],
)
def test_something_else(run: Path, against: str, message: str) -> None:
    with ExitStack() as stack, pytest.raises(ConfigError, match=message):
        sides_of(str(run), against, stack)


def test_a_commit_without_the_cfg(run: Path) -> None:
    root = run.parents[2]
    git(root, "checkout", "-q", "--orphan", "empty")
    git(root, "commit", "-q", "--allow-empty", "-m", "nothing")
    git(root, "rm", "-q", "-r", "--cached", ".")
    git(root, "commit", "-q", "--allow-empty", "-m", "empty")
    with ExitStack() as stack, pytest.raises(ConfigError, match=r"has no inside/small\.py, which is the run's cfg.py"):
        sides_of(str(run), "empty", stack)
    assert len(git(root, "worktree", "list").splitlines()) == 1


def test_the_folders_of_modules_that_are_installed_elsewhere_in_the_repository(tmp_path: Path) -> None:
    places = {
        "cfg.py": "inside/cfg.py",
        "modules/beside.py": "inside/beside.py",
        "modules/lib/__init__.py": "src/lib/__init__.py",
        "modules/lib/deep/nets.py": "src/lib/deep/nets.py",
        "modules/foreign.py": "../elsewhere/foreign.py",
    }
    root = tmp_path / "root"
    files = {
        name: KeptFile(path=str((root / place).resolve()), size_bytes=0, sha256="", kept=True)
        for name, place in places.items()
    }
    launch = KeptLaunch(tmp_path, 1, LaunchRecord(step=0, files=files))
    assert import_folders(launch, root) == [Path("inside"), Path("src")]


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with ExitStack() as stack, pytest.raises(ConfigError, match="expected a run directory"):
        sides_of(str(tmp_path), "HEAD", stack)


def test_the_newest_launch(run: Path) -> None:
    launch = newest_launch(RunDirectory(run))
    assert launch is not None
    assert (launch.number, launch.record.overrides) == (1, ["max_steps=4"])


def test_a_process_that_fails_is_one_error(run: Path, tmp_path: Path) -> None:
    """An interpreter without the package, or one that ends otherwise than by its steps."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho No module named disttrain >&2\nexit 1\n")
    program.chmod(0o755)
    running = Side("old", str(run), str(program)).begin(2, 0, tmp_path / "side")
    with pytest.raises(ConfigError, match="old cannot compute the steps: No module named disttrain"):
        running.wait()
    running.end()


def test_the_config_of_a_side_is_described_by_its_own_interpreter(run: Path, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho a cfg.py may print\n" + f"echo '{json.dumps({'seed': 5}, indent=2)}'\n")
    program.chmod(0o755)
    assert described(Side("a", str(run), str(program)), []) is None
    assert described(Side("a", str(run), str(program), cfg=tmp_path / "a.py"), []) == {"seed": 5}
    program.write_text("#!/bin/sh\necho ConfigError: wrong >&2\nexit 2\n")
    with pytest.raises(ConfigError, match="a: its config cannot be loaded: ConfigError: wrong"):
        described(Side("a", str(run), str(program), cfg=tmp_path / "a.py"), [])
