"""The config in docs/contrastive.md trains, and has the same bits after a resume."""

import json
import re
from pathlib import Path

import pytest
from commands import ROOT

from disttrain.commands.launch import main

PAGE = (ROOT / "docs" / "contrastive.md").read_text()
WORDS = ("max_epochs=none", "log.every_steps=1", "ledger.every_steps=1")

pytestmark = pytest.mark.usefixtures("torch_settings")


def test_the_config_learns_and_resumes(tmp_path: Path) -> None:
    (code,) = re.findall(r"(?ms)^```python file=views.py\n(.*?)^```$", PAGE)
    (tmp_path / "views.py").write_text(code)
    for words in (("name=whole", "max_steps=6"), ("name=cut", "max_steps=2"), ("name=cut", "max_steps=6")):
        assert main([str(tmp_path / "views.py"), *WORDS, *words, "--runs", str(tmp_path)]) == 0
    whole, cut = ((tmp_path / name / "ledger.jsonl").read_text() for name in ("whole", "cut"))
    assert whole == cut
    losses = [json.loads(line)["loss"] for line in (tmp_path / "cut" / "metrics" / "train.jsonl").open()]
    assert losses[0] > losses[-1]


def test_examples_that_the_page_names_exist() -> None:
    for name in re.findall(r"`(examples/\w+\.py)`", PAGE):
        assert (ROOT / name).is_file()
