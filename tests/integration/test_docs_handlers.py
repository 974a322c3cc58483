"""The average of the config in docs/handlers.md has the same bits after a resume as in an uninterrupted run."""

import re
import shutil
from pathlib import Path

import pytest
from commands import DIGITS, ROOT

from disttrain.commands.launch import main

PAGE = (ROOT / "docs" / "handlers.md").read_text()
WORDS = ("max_epochs=none", "schedule=none", "global_batch_size=16", "num_slots=2", "ledger.every_steps=1")

pytestmark = pytest.mark.usefixtures("torch_settings")


def test_the_average_is_restored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"(?ms)^```python file=averaged.py\n(.*?)^```$", PAGE)
    (tmp_path / "averaged.py").write_text(code)
    shutil.copy(DIGITS, tmp_path)
    for words in (("name=whole", "max_steps=4"), ("name=cut", "max_steps=2"), ("name=cut", "max_steps=4")):
        assert main([str(tmp_path / "averaged.py"), *WORDS, *words, "--runs", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "resuming from step 2" in shown
    assert "no checkpoint holds" not in shown
    whole, cut = ((tmp_path / name / "ledger.jsonl").read_text() for name in ("whole", "cut"))
    assert whole == cut
    assert '"kept.average.0.weight": ' in cut
