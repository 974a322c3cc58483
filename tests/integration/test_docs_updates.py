"""docs/updates.md: its commands run, its configs have the same bits after a kill, resized, and with other shards."""

import json
import re
from pathlib import Path

import pytest
from commands import ROOT
from resized import run_resized

from disttrain import Update
from disttrain.commands.launch import main

PAGE = (ROOT / "docs" / "updates.md").read_text()
SHORT = ("max_epochs=none", "max_steps=4")


def actor(folder: Path) -> Path:
    (code,) = re.findall(r"(?ms)^```python file=actor.py\n(.*?)^```$", PAGE)
    (folder / "actor.py").write_text(code)
    return folder / "actor.py"


@pytest.mark.parametrize("name", ["gan", "actor"])
def test_kills_ranks_workers_and_shards_change_no_bit(tmp_path: Path, name: str) -> None:
    cfg = ROOT / "examples" / "gan.py" if name == "gan" else actor(tmp_path)
    runs = run_resized(cfg, tmp_path / "runs")
    hashes = [json.loads(run.result_json.read_text())["params_sha256"] for run in runs]
    assert len(set(hashes)) == 1
    whole, *others = ([path.read_text() for path in (run.ledger_jsonl, run.metrics / "train.jsonl")] for run in runs)
    assert all(other == whole for other in others)


@pytest.mark.usefixtures("torch_settings")
def test_every_command_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = re.findall(r"(?m)^(?:torchrun .*|python) -m disttrain\.launch (.*)$", PAGE)
    assert [command.split()[0] for command in commands] == ["examples/gan.py", "examples/gan.py", "actor.py"]
    actor(tmp_path)
    for number, command in enumerate(commands):
        cfg, *words = command.split()
        path = ROOT / cfg if cfg.startswith("examples") else tmp_path / cfg
        assert main([str(path), *words, *SHORT, f"name=run{number}", "--runs", str(tmp_path)]) == 0


def test_the_fields_of_the_table_are_those_of_an_update() -> None:
    assert re.findall(r"(?m)^\| `(\w+)` \|", PAGE) == list(Update.model_fields)


@pytest.mark.slow
@pytest.mark.usefixtures("torch_settings")
def test_the_actor_learns(tmp_path: Path) -> None:
    assert main([str(actor(tmp_path)), "--runs", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "actor/metrics/valid.jsonl").read_text().splitlines()]
    assert lines[0]["right"] < 0.5
    assert lines[-1]["right"] > 0.8
