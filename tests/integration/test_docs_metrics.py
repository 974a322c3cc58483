"""The config of docs/metrics.md reports its values, and a resumed run the same ones."""

import json
import re
import shutil
from pathlib import Path

import pytest
from commands import DIGITS, ROOT

from disttrain.commands.launch import main

PAGE = (ROOT / "docs" / "metrics.md").read_text()
WORDS = ("max_epochs=none", "schedule=none", "global_batch_size=16", "num_slots=2", "log.every_steps=2")

pytestmark = pytest.mark.usefixtures("torch_settings")


def test_the_page_shows_what_the_config_reports(tmp_path: Path) -> None:
    (code,) = re.findall(r"(?ms)^```python file=measured.py\n(.*?)^```$", PAGE)
    (shown,) = re.findall(r"(?ms)^```json\n(.*?)^```$", PAGE)
    (tmp_path / "measured.py").write_text(code)
    shutil.copy(DIGITS, tmp_path)
    for words in (("name=whole", "max_steps=4"), ("name=cut", "max_steps=2"), ("name=cut", "max_steps=4")):
        assert main([str(tmp_path / "measured.py"), *WORDS, *words, "--runs", str(tmp_path)]) == 0
    whole, cut = ((tmp_path / name / "metrics" / "train.jsonl").read_text() for name in ("whole", "cut"))
    assert whole == cut
    lines = [json.loads(line) for line in whole.splitlines()]
    assert list(lines[-1]) == list(json.loads(shown))
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["ce"] + 1e-4 * lines[-1]["size"])
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert result["train"] == {name: lines[-1][name] for name in lines[-1] if name not in ("step", "epoch")}
    assert {"loss", "ce", "size", "nines", "accuracy"} == set(result["metrics"])
