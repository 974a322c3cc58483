"""The commands and configs of docs/evaluations.md have the effects that the page describes."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import DIGITS, ROOT

from disttrain.commands.launch import main
from disttrain.commands.main import main as disttrain

PAGE = (ROOT / "docs" / "evaluations.md").read_text()
SHORT = ("max_epochs=none", "max_steps=6", "global_batch_size=16", "num_slots=2", "validate.every_steps=1")

pytestmark = pytest.mark.usefixtures("torch_settings")


def run_page(folder: Path, name: str, *words: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a cfg.py of the page; return its result and the lines of its training curve."""
    [code] = re.findall(rf"(?ms)^```python file={name}.py\n(.*?)^```$", PAGE)
    (folder / f"{name}.py").write_text(code)
    shutil.copy(DIGITS, folder)
    assert main([str(folder / f"{name}.py"), *SHORT, *words, "--runs", str(folder)]) == 0
    lines = (folder / name / "metrics" / "train.jsonl").read_text().splitlines()
    return json.loads((folder / name / "result.json").read_text()), [json.loads(line) for line in lines]


def test_its_commands_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"(?ms)^```bash run\n(.*?)^```$", PAGE)
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command)
        assert words[:4] == ["python", "-m", "disttrain.launch", "examples/digits.py"]
        short = [word for word in SHORT if not word.startswith("validate.")]
        assert main([str(DIGITS), *words[4:], "schedule=none", *short, "--runs", str(tmp_path), "--fresh"]) == 0
    [export] = re.findall(r"(?ms)^```bash export\n(.*?)^```$", PAGE)
    places = {"runs/average": str(tmp_path / "average"), "model.safetensors": str(tmp_path / "model.safetensors")}
    words = [places.get(word, word) for word in shlex.split(export)]
    capsys.readouterr()
    assert words[0] == "disttrain"
    assert disttrain(words[1:]) == 0
    assert "the moving average of the weights" in capsys.readouterr().out
    for weights in re.findall(r"`--weights (\w+)`", PAGE):
        assert (
            disttrain(
                ["checkpoint", "export", "--weights", weights, str(tmp_path / "average"), str(tmp_path / weights)]
            )
            == 0
        )
        assert ("moving average" in capsys.readouterr().out) == (weights == "ema")


def test_a_handler_of_an_evaluation_changes_the_rate(tmp_path: Path) -> None:
    _, lines = run_page(tmp_path, "halved", "optimizer.lr=1e-3")
    assert [line["learning_rate"] for line in lines] == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4]


def test_the_rate_falls_when_the_accuracy_does_not_rise(tmp_path: Path) -> None:
    _, lines = run_page(tmp_path, "plateau", "optimizer.lr=1e-3")
    found = (tmp_path / "plateau" / "metrics" / "valid.jsonl").read_text().splitlines()
    values = [json.loads(line)["accuracy"] for line in found]
    rate, best, expected = 1e-3, 0.0, [1e-3]
    for value in values[:-1]:
        rate = rate if value > best * (1 + 1e-4) else rate / 2
        best = max(best, value)
        expected.append(rate)
    assert [line["learning_rate"] for line in lines] == expected
    assert len(set(expected)) > 1


def test_a_run_that_ends_early_stays_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(DIGITS), "name=early", "schedule=none", *SHORT, "--runs", str(tmp_path)]
    words += ["early_stop.monitor=loss", "early_stop.patience=2", "early_stop.min_delta=9.0"]
    assert main(words) == 0
    result = json.loads((tmp_path / "early" / "result.json").read_text())
    assert (result["status"], result["step"]) == ("completed", 3)
    shape = r"early: valid/loss has not improved by [\d.e-]+ for \d evaluations \(best [\d.]+ at step \d+\)"
    assert re.fullmatch(shape, result["stopped"])
    assert re.search(shape, PAGE)
    assert re.search(rf"(?m)^ended +{re.escape(result['stopped'])}$", capsys.readouterr().out)
    assert main([*words, "max_steps=9"]) == 0
    out = capsys.readouterr().out
    assert f"was ended {result['stopped']}; it goes on with a larger early_stop.patience" in out
    assert "resuming" not in out
    assert main([*words, "early_stop.monitor=none"]) == 0
    assert "resuming from step 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "early" / "result.json").read_text())["step"] == 6
