"""`disttrain bisect` names the first step that differs, and the first module in it."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from replayed_runs import CFG, NORMS, forget_modules, run_in, write_code

from disttrain.commands import bisect_sides
from disttrain.commands.bisect import main as bisect
from disttrain.commands.main import main

pytestmark = pytest.mark.usefixtures("torch_settings")


class Here:
    """A process of `disttrain replay` or of --print-config, run in this process, which saves seconds for each."""

    calls: list[list[str]] = []

    def __init__(self, words: list[str], stderr: Any, folders: Any) -> None:
        assert words[1:3] == ["-m", "disttrain"]
        self.calls.append(words[3:])
        sys.modules.pop("norms", None)
        path = list(sys.path)
        text = io.StringIO()
        with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
            self.code = main(words[3:])
        sys.path[:] = path
        stderr.write(text.getvalue().encode())

    def wait(self) -> int:
        return self.code

    def poll(self) -> int:
        return self.code


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[Here]:
    monkeypatch.setattr(bisect_sides, "start_process", Here)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Here.calls = []
    return Here


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    write_code(folder)
    with pytest.MonkeyPatch.context() as patch:
        return run_in(folder, patch)


def found(capfd: pytest.CaptureFixture[str], *words: str, code: int = 1) -> dict[str, Any]:
    capfd.readouterr()
    assert bisect([*words, "--json"]) == code
    return dict(json.loads(capfd.readouterr().out))


def test_a_changed_epsilon_is_named_by_step_and_module(
    here: type[Here], run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change is at step 12: the two steps after the checkpoint of step 10 show it."""
    cfg = write_code(tmp_path, ("10**9", "12"))
    monkeypatch.setattr("disttrain.commands.bisect.described", lambda side, overrides: None)
    difference = found(capfd, str(run), "--against", str(cfg))
    assert (difference["step"], difference["part"], difference["computed"]) == (12, "loss", [6, 12])
    assert difference["module"] == "model.1"
    outputs = difference["outputs"]
    assert [each["pass"] for each in outputs] == ["forward", "forward"]
    assert (outputs[0]["call"], outputs[0]["slot"], outputs[0]["class"]) == (1, 0, "LayerNorm")
    assert outputs[0]["hash"] != outputs[1]["hash"]
    starts = [words[words.index("--start") + 1] for words in here.calls]
    assert starts == ["10", "5", "5", "5", "5"]
    assert bisect([str(run), "--against", str(cfg)]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith(f"{run} and {cfg}: first difference at step 12: the loss (slot 0, ")
    assert (
        lines[1]
        == "The same in this step: the choice of samples, the loaded data. The state was the same after step 11."
    )
    assert lines[2].startswith("first module: the output of model.1 (LayerNorm), call 1 in slot 0: ")


def test_a_change_that_halving_misses(
    here: type[Here], run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made in one step alone, so code that begins after that step computes the same: then all are computed."""
    monkeypatch.setattr("disttrain.commands.bisect.described", lambda side, overrides: None)
    cfg = write_code(tmp_path, ("iteration >= CHANGED_AT", "iteration == 14"))
    difference = found(capfd, str(run), "--against", str(cfg))
    assert (difference["step"], difference["module"], difference["computed"]) == (14, "model.1", [1, 14])
    here.calls.clear()
    difference = found(capfd, str(run), "--against", str(cfg), "--from", "15", code=0)
    assert (difference["step"], difference["computed"]) == (None, [16, 16])
    assert [words[words.index("--start") + 1] for words in here.calls] == ["15"]


def test_another_update_of_the_optimizer(
    here: type[Here], run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss shows it in the step that it changes, and the ledger hashes the state every 4 steps only."""
    monkeypatch.setattr("disttrain.commands.bisect.described", lambda side, overrides: None)
    cfg = write_code(tmp_path, ("10**9", "7"))
    cfg.write_text(cfg.read_text().replace("run.model[1].eps = 1e-3", "run.optimizer.param_groups[0]['eps'] = 1e-3"))
    difference = found(capfd, str(run), "--against", str(cfg))
    assert (difference["step"], difference["part"], difference["module"]) == (7, "model", None)
    assert difference["computed"] == [6, 8]


def test_inside_a_compiled_model_nothing_is_named(
    here: type[Here], run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is."""
    monkeypatch.setattr("disttrain.commands.bisect.described", lambda side, overrides: None)
    copied = Path(shutil.copytree(run, tmp_path / "small"))
    content = json.loads((copied / "config.json").read_text())
    content["fields"]["compile"] = True  # bisect asks this file; the run's cfg.py is not changed, to be fast
    (copied / "config.json").write_text(json.dumps(content))
    cfg = write_code(tmp_path, ("10**9", "12"))
    assert bisect([str(copied), "--against", str(cfg)]) == 1
    out, err = capfd.readouterr()
    assert "first difference at step 12: the loss" in out
    assert len(out.splitlines()) == 2
    assert "the model is compiled" in err
    assert not any("--modules" in words for words in here.calls)


def test_code_that_begins_otherwise(
    here: type[Here], run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("disttrain.commands.bisect.described", lambda side, overrides: {"seed": 9})
    cfg = write_code(tmp_path, ("num_slots=4", "num_slots=4, seed=9"))
    difference = found(capfd, str(run), "--against", str(cfg))
    assert (difference["step"], difference["part"], difference["module"]) == (0, "began", None)
    assert all(words[words.index("--start") + 1] == "0" for words in here.calls)


def test_two_runs_with_ledgers(
    here: type[Here], run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their states are halved; a change of the optimizer shows in no module of the step that it changes first."""
    changed = CFG.replace("10**9", "11").replace(
        "run.model[1].eps = 1e-3", "run.optimizer.param_groups[0]['eps'] = 1e-3"
    )
    (tmp_path / "norms.py").write_text(NORMS)
    (tmp_path / "small.py").write_text(changed)
    other = run_in(tmp_path, monkeypatch)
    difference = found(capfd, str(run), "--against", str(other))
    assert (difference["step"], difference["part"]) == (11, "model")  # the ledgers alone show it at step 12
    assert difference["module"] is None
    assert difference["computed"][0] == 6  # after the checkpoint before step 8, whose states are the same
    assert bisect([str(run), "--against", str(other)]) == 1
    assert "the outputs of all modules and the gradients of the slots are the same" in capfd.readouterr().out
    same = found(capfd, str(run), "--against", str(run), code=0)
    assert (same["step"], same["module"]) == (None, None)


def test_a_machine_with_other_bits_than_the_runs(
    here: type[Here], run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the two sides are held against each other, and not against the ledger."""
    copied = Path(shutil.copytree(run, tmp_path / "small"))
    ledger = [json.loads(line) for line in (copied / "ledger.jsonl").read_text().splitlines()]
    for line in ledger[1:]:
        line.pop("state", None)
        line.pop("slots", None)
        line["loss"] = (float.fromhex(line["loss"]) + 2**-20).hex()
    (copied / "ledger.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in ledger))
    monkeypatch.setattr("disttrain.commands.bisect.described", lambda side, overrides: None)
    cfg = write_code(tmp_path, ("10**9", "12"))
    difference = found(capfd, str(copied), "--against", str(cfg))
    assert (difference["step"], difference["module"]) == (12, "model.1")
    assert bisect([str(copied), "--against", str(cfg)]) == 1
    assert "this machine or its versions give other bits than the run's" in capfd.readouterr().err
    write_code(tmp_path)
    same = found(capfd, str(copied), "--against", str(cfg), code=0)
    assert same["step"] is None


def test_data_that_differs_needs_no_modules(
    here: type[Here], run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_code(tmp_path, ("num_slots=4", "num_slots=4, seed=3"))
    other = run_in(tmp_path, monkeypatch)
    difference = found(capfd, str(run), "--against", str(other))
    assert difference["step"] == 0
    assert difference["part"] == "began"
    assert difference["module"] is None


@pytest.mark.slow
def test_a_planted_epsilon_at_step_30_as_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Against the commit before the change; against this interpreter nothing is found."""
    write_code(tmp_path, ("max_steps=16", "max_steps=60"))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "small.py", "norms.py"], cwd=tmp_path, check=True)
    identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run(["git", *identity, "commit", "-q", "-m", "good"], cwd=tmp_path, check=True)
    run = run_in(tmp_path, monkeypatch, "max_steps=29")
    write_code(tmp_path, norms="EPS = 1e-4\n")
    forget_modules(monkeypatch)
    (tmp_path / "small.py").write_text(CFG.replace("max_steps=16", "max_steps=60"))
    run_in(tmp_path, monkeypatch)  # continued with the changed epsilon from step 30 on
    capfd.readouterr()
    for against in ("HEAD", sys.executable):
        words = [sys.executable, "-m", "disttrain", "bisect", str(run), "--against", against, "--json"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.stdout, done.stderr
        difference = json.loads(done.stdout)
        if against == "HEAD":
            assert done.returncode == 1, done.stderr
            assert (difference["step"], difference["module"]) == (30, "model.1"), done.stderr
        else:
            assert (done.returncode, difference["step"]) == (0, None), done.stderr
