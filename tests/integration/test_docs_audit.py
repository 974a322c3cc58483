"""The command of docs/audit.md audits its steps, and its facts about fields and files are right."""

import json
import re
import shlex
from pathlib import Path

import pytest
from commands import DIGITS, ROOT

from disttrain.commands.launch import main
from disttrain.errors import FaultyRank

PAGE = (ROOT / "docs" / "audit.md").read_text()

pytestmark = pytest.mark.usefixtures("torch_settings")


def test_its_command_audits_the_steps(tmp_path: Path) -> None:
    [command] = re.findall(r"(?ms)^```bash run\n(.*?)^```$", PAGE)
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "disttrain.launch", "examples/digits.py"]
    assert main([str(DIGITS), *words[4:], "--runs", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "digits" / "result.json").read_text())
    assert result["audit"] == {"steps": result["step"] // 5, "faults": []}
    assert result["step"] >= 5
    assert not (tmp_path / "digits" / "audits.jsonl").exists()


def test_its_exit_code_is_that_of_the_error() -> None:
    assert f"exit code {FaultyRank.exit_code}" in PAGE


@pytest.mark.parametrize(
    "words", [("precision=apex",), ("strategy=fsdp", "fsdp_gather=module"), ("backend=xla",), ("deterministic=false",)]
)
def test_what_it_says_is_refused_is_refused(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(DIGITS), *words, "audit.every_steps=5", "--runs", str(tmp_path)]) == 2
    assert "audit.every_steps=5" in capsys.readouterr().err
