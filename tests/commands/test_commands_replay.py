"""`disttrain replay` prints, debugs and dissects any step of a run, by the code that did it, and changes nothing."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from replayed_runs import forget_modules, run_in, write_code

from disttrain.commands.main import main
from disttrain.evidence import read_ledger
from disttrain.run.directory import RunDirectory

pytestmark = pytest.mark.usefixtures("torch_settings")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of two launches, of which the second has another number of steps."""
    folder = tmp_path_factory.mktemp("folder")
    write_code(folder)
    with pytest.MonkeyPatch.context() as patch:
        run_in(folder, patch, "max_steps=7")
        return run_in(folder, patch)


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Path:
    """Return a copy of the run directory, in a process that has not imported the run's module."""
    forget_modules(monkeypatch)
    monkeypatch.setattr(sys, "path", list(sys.path))
    capfd.readouterr()
    return Path(shutil.copytree(made, tmp_path / "small"))


def replayed(run: Path, step: int, *words: str, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["replay", str(run), "--step", str(step), "--json", *words]) == 0
    return dict(json.loads(capfd.readouterr().out))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_step_as_json(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = read_ledger(run / "ledger.jsonl")[13]
    before = contents(run)
    found = replayed(run, 13, capfd=capfd)
    assert contents(run) == before
    assert found["step"] == 13
    assert found["epoch"] == 4
    assert (found["from_step"], found["proven_steps"]) == (10, 3)
    assert found["from"] == f"the checkpoint {run / 'checkpoints' / 'step-00000010'}"
    assert float(found["loss"]).hex() == line["loss"]
    assert float(found["grad_norm"]).hex() == line["grad_norm"]
    assert [slot["slot"] for slot in found["slots"]] == [0, 1, 2, 3]
    assert sorted(len(slot["indices"]) for slot in found["slots"]) == [2, 2, 2, 2]
    assert sum(slot["loss"] for slot in found["slots"]) / 4 == pytest.approx(found["loss"], rel=1e-12)


def test_a_step_as_a_table(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run), "--step", "16"]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"{run}, step 16 (epoch 4), from the checkpoint of step 15"
    assert lines[1].split() == ["slot", "loss", "grad", "norm", "samples"]
    assert len(lines) == 8
    loss = float.fromhex(read_ledger(run / "ledger.jsonl")[16]["loss"])
    assert lines[6].startswith(f"the whole step: loss {loss!r}, ")
    assert lines[7] == "proven: step 16 has the bits of the run's ledger"
    assert "a cfg.py may print" in err


def test_before_the_first_checkpoint_it_begins_with_the_run(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = replayed(run, 3, capfd=capfd)
    assert (found["from"], found["from_step"], found["proven_steps"]) == ("the beginning of the run", 0, 3)


def test_one_slot(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = replayed(run, 12, capfd=capfd)
    alone = replayed(run, 12, "--slot", "2", capfd=capfd)
    assert alone["slots"] == [whole["slots"][2]]
    assert (alone["loss"], alone["proven_steps"]) == (None, 2)  # the ledger has the losses of the slots of step 12
    assert main(["replay", str(run), "--step", "13", "--slot", "2"]) == 0
    assert "the ledger has no losses of the slots of step 13" in capfd.readouterr().out


def test_the_outputs_of_all_modules(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run), "--step", "16", "--slot", "1", "--modules"]) == 0
    records = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    names = [each["module"] for each in records if each["pass"] == "forward"]
    assert names == ["model.0", "model.1", "model.2", "model.3", "model", "loss", ""]
    file = tmp_path / "modules.jsonl"
    assert main(["replay", str(run), "--step", "16", "--modules", str(file)]) == 0
    assert "proven: step 16" in capfd.readouterr().out  # the hooks change no bit
    of_file = [json.loads(line) for line in file.read_text().splitlines()]
    assert [each for each in of_file if each["slot"] == 1] == records
    assert [each["slot"] for each in of_file] == sorted(each["slot"] for each in of_file)


def test_the_debugger_opens_before_the_model(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    typed = "p 'seen', step, slot, tuple(x.shape), type(model).__name__\nc\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert main(["replay", str(run), "--step", "16", "--slot", "3", "--debug"]) == 0
    out = capfd.readouterr().out
    assert "step 16, slot 3, before model(x)" in out
    assert "('seen', 16, 3, (2, 6), 'Sequential')" in out
    assert f"{run}, step 16" in out.splitlines()[-4] + out.splitlines()[-3] + out.splitlines()[-5]
    monkeypatch.setattr(sys, "stdin", io.StringIO("q\n"))
    assert main(["replay", str(run), "--step", "16", "--debug"]) == 0
    assert "left the debugger in step 16" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "17"], "--step 17: there is no such step: the ledger of RUN has 1 to 16"),
        (["--step", "0"], "--step 0: there is no such step"),
        (["--step", "9", "--slot", "4"], "--slot 4: expected one of the run's slots, 0 to 3"),
        (["--step", "9", "--slot", "-1"], "--slot -1: expected one of the run's slots, 0 to 3"),
        (["--step", "9", "--modules", "no/such"], "--modules no/such: it cannot be written: No such file or directory"),
        (["--step", "9", "--modules", "--debug"], "expected --debug or --modules, got both"),
    ],
)
def test_mistakes(run: Path, words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(run), *words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith(f"ConfigError: {message.replace('RUN', str(run))}")


def test_a_folder_without_a_run_or_a_ledger(tmp_path: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path / "none"), "--step", "1"]) == 2
    assert "expected a run directory" in capfd.readouterr().err
    (run / "ledger.jsonl").unlink()
    assert main(["replay", str(run), "--step", "1"]) == 2
    assert "expected a run's ledger at" in capfd.readouterr().err


def test_a_run_under_way(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing waits for its lock; its last line may be cut short."""
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"step": 17, "epo')
    directory = RunDirectory(run)
    directory.lock()
    try:
        assert replayed(run, 16, capfd=capfd)["proven_steps"] == 1
    finally:
        directory.close()


def test_a_step_that_differs_is_named_with_what_is_known(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (record,) = (run / "launches").glob("0002/launch.json")
    content = json.loads(record.read_text())
    content["versions"]["torch"] = "1.0"
    record.write_text(json.dumps(content))
    ledger = run / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    lines[12]["grad_norm"] = (2.0).hex()
    ledger.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main(["replay", str(run), "--step", "13"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("Mismatch: step 12 is not the run's: the gradient's norm: expected 2.0 (0x1.0")
    assert "step 11 was the same" in last
    assert "Other bits are to be expected: torch: 1.0 then, " in last


def test_an_unproven_step_is_shown_all_the_same(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ledger = run / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    lines[12]["loss"] = (2.0).hex()
    ledger.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main(["replay", str(run), "--step", "13", "--unproven"]) == 1
    out, err = capfd.readouterr()
    assert out.splitlines()[-2:] == [
        "proven: step 11 has the bits of the run's ledger",
        "not the run's bits from step 12 on: it differs from the ledger",
    ]
    assert "WARNING: Mismatch: step 12 is not the run's" in err
    assert main(["replay", str(run), "--step", "13", "--unproven", "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["differs"].startswith("step 12 is not the run's")


def test_code_that_has_changed(made: Path, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The run's copies are imported; with --code now those of now, and then the step differs."""
    norms = made.parents[1] / "norms.py"
    text = norms.read_text()
    try:
        norms.write_text("EPS = 0.1\n")
        found = replayed(run, 16, capfd=capfd)
        assert found["proven_steps"] == 1
        assert main(["replay", str(run), "--step", "16"]) == 0
        assert "changed since launch 2, which did step 16: norms; the copies" in capfd.readouterr().err
        sys.modules.pop("norms")
        assert main(["replay", str(run), "--step", "16", "--code", "now"]) == 1
        err = capfd.readouterr().err.splitlines()[-1]
        assert "step 16 is not the run's: the loss" in err
        assert "changed since launch 2, which saved the checkpoint: norms.py" in err
    finally:
        norms.write_text(text)
