"""The commands of docs/replay.md work as it says."""

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from commands import DIGITS, ROOT, checkpoints, launch

from disttrain.commands.main import main

PAGE = (ROOT / "docs" / "replay.md").read_text()
SHORT = ("max_epochs=none", "max_steps=14", "schedule=none", "checkpoint.every_steps=10")

pytestmark = pytest.mark.usefixtures("torch_settings")


def commands_of(kind: str) -> list[list[str]]:
    [block] = re.findall(rf"(?ms)^```bash {kind}\n(.*?)^```$", PAGE)
    return [shlex.split(line) for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of the digits on two ranks."""
    path = tmp_path_factory.mktemp("page")
    shutil.copy(DIGITS, path)
    done = launch("digits.py", *SHORT, ranks=2, cwd=path)
    assert done.code == 0, done.text
    return path


def test_a_step_its_slots_and_its_modules(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    outputs = []
    for words in commands_of("run"):
        assert words[:3] == ["disttrain", "replay", "runs/digits"]
        assert main(words[1:]) == 0
        outputs.append(capfd.readouterr().out)
    table = outputs[0].splitlines()
    shown = re.search(r"(?ms)^```\n(runs/digits, step 12.*?)^```$", PAGE)
    assert shown is not None
    of_page = shown[1].splitlines()
    assert [line.rstrip() for line in table[:2]] == of_page[:2]
    assert len(table) == 2 + 8 + 2
    for line in (2, 3):
        assert table[line].split()[3:] == of_page[line].split()[3:]  # the samples; the numbers depend on the kernels
    assert table[-1] == of_page[-1]
    slot = json.loads(outputs[1])["slots"][0]
    assert table[2 + 3].split()[:2] == ["3", repr(slot["loss"])]
    records = [json.loads(line) for line in (folder / "modules.jsonl").read_text().splitlines()]
    assert {each["slot"] for each in records} == {3}
    named = re.search(r"JSON object a line .*?:\s+(`slot`.*?)\. The\s+gradients", PAGE, re.S)
    assert named is not None
    assert list(records[0]) == re.findall(r"`(\w+)`", named[1])
    assert {each["pass"] for each in records} == {"forward", *re.findall(r'"(backward|gradient)"', PAGE)}


def test_the_debugger(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    [words] = commands_of("debug")
    typed = re.findall(r"(?m)^\(Pdb\) (.*)$", PAGE)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*typed, "p 'in the forward', self is not None", "c", ""])))
    assert main(words[1:]) == 0
    out = capfd.readouterr().out
    assert "torch.Size([12, 1, 8, 8])" in out
    assert "('in the forward', True)" in out
    assert "proven: step 11 has the bits" in out  # the ledger of this run has no losses of the slots of step 12


def test_anchors_stay(folder: Path) -> None:
    [words] = commands_of("anchors")
    (folder / "examples").symlink_to(ROOT / "examples")
    done = launch(*words[3:], "name=anchored", "max_epochs=4", cwd=folder)  # more epochs than checkpoints are kept
    assert done.code == 0, done.text
    assert checkpoints(folder / "runs" / "anchored") == [10, 20, 30, 40, 42, 50, 56]


def test_every_option_that_it_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    helped = ""
    for command in ("replay", "bisect", "checkpoint prune"):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        helped += capsys.readouterr().out
    for option in set(re.findall(r"`(--[a-z]+)", PAGE)):
        assert option in helped, option
    assert all(f"--{name}" in PAGE for name in ("slot", "debug", "modules", "json", "code", "from", "against"))


def test_what_bisect_takes() -> None:
    sides = [words[-1] for words in commands_of("bisect")]
    assert [words[:4] for words in commands_of("bisect")] == [["disttrain", "bisect", "runs/digits", "--against"]] * 4
    assert sides[0].endswith(".py")
    assert sides[2].endswith("python")


@pytest.mark.slow
def test_bisect_against_another_cfg(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "other.py").write_text(DIGITS.read_text().replace("nn.BatchNorm2d(64)", "nn.BatchNorm2d(64, eps=1e-4)"))
    words = commands_of("bisect")[0]
    assert main(words[1:]) == 1
    out = capfd.readouterr().out
    assert "runs/digits and other.py: first difference at step 1: the loss" in out
    assert "first module: the output of model.4 (BatchNorm2d), call 1 in slot 0: " in out
