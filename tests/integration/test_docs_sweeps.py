"""The sweep of docs/sweeps.md, typed as it stands there (slow), and shorter in this process."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment

from disttrain.commands.launch import main
from disttrain.commands.main import run_words

PAGE = (ROOT / "docs" / "sweeps.md").read_text()
SWEEP, READ = re.findall(r"(?ms)^```bash\n(.*?)^```$", PAGE)
SHORT = ("max_epochs=none", "schedule=none", "max_steps=6", "num_slots=2")

pytestmark = pytest.mark.usefixtures("torch_settings")


def test_four_runs_of_one_cfg_are_read_back_as_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = re.findall(r"for lr in (.*); do", SWEEP)[0].split()
    (line,) = re.findall(r"(?m)^  python -m disttrain.launch (.*)$", SWEEP)
    (table,) = re.findall(r"(?m)^disttrain (runs .*)$", SWEEP)
    monkeypatch.chdir(tmp_path)
    for rate in rates:
        words = shlex.split(line.replace("$lr", rate))
        given = [word for word in words if not word.startswith("max_epochs")]
        assert main([str(ROOT / given[0]), *given[1:], *SHORT]) == 0
    results = {
        f"lr-{rate}": json.loads((tmp_path / f"runs/sweep/lr-{rate}/result.json").read_text())["metrics"]["accuracy"]
        for rate in rates
    }
    assert len(rates) == len(set(results.values())) == 4
    capsys.readouterr()
    assert run_words(shlex.split(table)) == 0
    heading, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert heading == ["name", "status", "step", "optimizer.lr", "train.loss", "valid.loss", "valid.accuracy"]
    assert [(row[0], row[3], row[-1]) for row in rows] == [
        (name, f"{float(name[3:]):.6g}", f"{results[name]:.6g}")
        for name in sorted(results, key=lambda name: -results[name])
    ]
    assert run_words([*shlex.split(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["name"] == rows[0][0]


@pytest.mark.slow
def test_the_page_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        ["bash", "-euc", f"{SWEEP}\n{READ}"],
        cwd=tmp_path,
        env={**environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    best = done.stdout.splitlines()[-1]
    shown = [line for line in done.stdout.splitlines() if re.match(r"lr-[0-9.]+ +completed +70 ", line)]
    assert len(shown) == 4
    assert shown[0].startswith(best)
    example = re.findall(r"(?ms)^```\n(name .*?)^```$", PAGE)[0].splitlines()
    assert example[0].split() in [line.split() for line in done.stdout.splitlines()]
    assert sorted(line.split()[0] for line in example[1:]) == sorted(line.split()[0] for line in shown)
    longer = re.findall(r"`python -m disttrain.launch (examples/.*?)`", PAGE)[0]
    assert main([*shlex.split(longer.replace("examples", str(ROOT / "examples"))), "--check"]) == 0
