"""`disttrain launchers`: what it lists, what it copies, what it refuses; and what a wheel holds."""

import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from disttrain.commands import launchers as module
from disttrain.commands.launchers import installed
from disttrain.commands.main import main

LAUNCH = Path(__file__).parents[2] / "launch"
NAMES = sorted(path.name for path in LAUNCH.iterdir() if path.is_dir())
FILES = sorted(path for path in LAUNCH.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def test_it_lists_every_file_with_what_it_says_about_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launchers"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line for line in listed if line and not line.startswith((" ", "disttrain"))] == NAMES
    described = [line.split(maxsplit=1) for line in listed if line.startswith("  ")]
    assert sorted(name for name, _ in described) == sorted(path.name for path in FILES)
    assert all(text[0].isupper() for _, text in described), described


def test_it_copies_all_of_them_and_scripts_can_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launchers", "copy", str(tmp_path / "mine")]) == 0
    copied = {str(path.relative_to(LAUNCH)): tmp_path / "mine" / path.relative_to(LAUNCH) for path in FILES}
    assert capsys.readouterr().out.splitlines() == [str(path) for path in copied.values()]
    for name, path in copied.items():
        assert path.read_bytes() == (LAUNCH / name).read_bytes()
        assert os.access(path, os.X_OK) == path.read_text().startswith("#!")
    assert main(["launchers", "copy", str(tmp_path / "mine")]) == 0  # again: they are there already


def test_it_copies_one_and_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launchers", "copy", str(tmp_path), "slurm"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["slurm"]
    (tmp_path / "slurm/job.sh").write_text("mine")
    assert main(["launchers", "copy", str(tmp_path), "local", "slurm"]) == 2
    message = f"ConfigError: {tmp_path}/slurm/job.sh is there with another content; remove it, or choose another folder"
    assert capsys.readouterr().err == f"{message}\n"
    assert (tmp_path / "slurm/job.sh").read_text() == "mine"
    assert not (tmp_path / "local").exists()


def test_wrong_words_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launchers", "copy", str(tmp_path), "slrum"]) == 2
    assert "'slrum' is no launcher" in (text := capsys.readouterr().err)
    assert "slurm" in text
    (tmp_path / "file").touch()
    assert main(["launchers", "copy", str(tmp_path / "file"), "slurm"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_package_without_them_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_PACKAGE", tmp_path / "disttrain")
    assert main(["launchers"]) == 2
    assert "install disttrain again" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wheel_holds_the_folder_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, LAUNCH.parent]
    subprocess.run(command, check=True, capture_output=True, text=True)
    [wheel] = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    monkeypatch.setattr(module, "_PACKAGE", tmp_path / "site/disttrain")
    held = [path for files in installed().values() for path in files]
    assert [str(path.relative_to(tmp_path / "site/disttrain/launchers")) for path in held] == [
        str(path.relative_to(LAUNCH)) for path in FILES
    ]
    assert [path.read_bytes() for path in held] == [path.read_bytes() for path in FILES]


def test_the_commands_of_the_pages_copy_what_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    copied = set()
    for page in ("launching", "kubernetes", "ray", "skypilot"):
        blocks = re.findall(r"(?ms)^```bash[^\n]*\n(.*?)^```$", (LAUNCH.parent / f"docs/{page}.md").read_text())
        commands = [line for block in blocks for line in block.splitlines() if line.startswith("disttrain launchers")]
        assert commands
        for command in commands:
            assert main(shlex.split(command)[1:]) == 0
            copied |= set(shlex.split(command)[4:])
        # What the page runs then is there.
        for name in re.findall(r"\b(launch/(?:kubernetes|ray|skypilot)/\w+\.\w+)", "".join(blocks)):
            assert (tmp_path / name).is_file(), name
    assert copied == {"slurm", "kubernetes", "ray", "skypilot"}
