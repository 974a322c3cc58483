"""The commands of docs/validation.md work as it says, on one rank and on two."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import DIGITS, ROOT, environment, launch, lines

from disttrain.commands.main import main

PAGE = (ROOT / "docs" / "validation.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page")
    shutil.copy(DIGITS, path)
    short = ("max_epochs=none", "max_steps=2", "num_slots=2", "schedule=none")
    done = launch("digits.py", *short, "checkpoint.monitor=accuracy", cwd=path)
    assert done.code == 0, done.text
    return path


def test_the_commands_print_what_the_run_logged(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    [block] = re.findall(r"(?ms)^```bash run\n(.*?)^```$", PAGE)
    outputs = []
    for command in block.splitlines():
        words = shlex.split(command)
        assert words[0] == "disttrain"
        assert main(words[1:]) == 0
        outputs.append(capfd.readouterr().out)
    [logged] = lines(folder / "runs" / "digits" / "metrics" / "valid.jsonl")
    shown = outputs[0].splitlines()
    assert shown == [
        "runs/digits, step 2:",
        f"  loss      {logged['loss']}",
        f"  accuracy  {logged['accuracy']}",
        "the same as the run logged at this step, to the last bit",
    ]
    found = json.loads(outputs[1])
    assert list(found) == re.findall(r"`(\w+)`", re.search(r"one object with (.*?)\. Standard", PAGE, re.S)[1])  # type: ignore[index]
    assert found["values"] == {name: logged[name] for name in ("loss", "accuracy")}


def test_every_option_that_it_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    helped = capsys.readouterr().out
    options = set(re.findall(r"`(--[a-z]+)", PAGE))
    assert options == {"--checkpoint", "--data", "--ranks", "--json"}
    assert all(option in helped for option in options)


@pytest.mark.slow
def test_on_two_ranks(folder: Path) -> None:
    # As it is typed: ranks that are started from here would print where this process printed when it began.
    words = [sys.executable, "-m", "disttrain", "evaluate", "runs/digits", "--ranks", "2", "--json"]
    done = subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["same_as_logged"] is True
