"""A step is replayed with the code of the launch that did it; steps of launches with other code come from processes."""

import json
import sys
from pathlib import Path

import pytest
from replayed_runs import CFG, NORMS, forget_modules, run_in, write_code

from disttrain.commands.main import main
from disttrain.commands.replayed_code import segments
from disttrain.run.launches import KeptFile, KeptLaunch, LaunchRecord

pytestmark = pytest.mark.usefixtures("torch_settings")


def launch(number: int, step: int, code: str, *overrides: str) -> KeptLaunch:
    file = KeptFile(path="cfg.py", size_bytes=1, sha256=code, kept=True)
    return KeptLaunch(
        Path(str(number)), number, LaunchRecord(step=step, files={"cfg.py": file}, overrides=[*overrides])
    )


def parts(launches: list[KeptLaunch], start: int, step: int) -> list[tuple[int, int]]:
    return [(found.number, last) for found, last in segments(launches, start, step)]


def test_the_launches_that_did_the_steps() -> None:
    launches = [launch(1, 0, "a"), launch(2, 10, "a", "max_steps=9"), launch(3, 20, "b"), launch(4, 25, "b", "seed=1")]
    assert parts(launches, 0, 10) == [(1, 10)]
    assert parts(launches, 0, 20) == [(2, 20)]  # the same code, with another length
    assert parts(launches, 5, 24) == [(2, 20), (3, 24)]
    assert parts(launches, 20, 24) == [(3, 24)]
    assert parts(launches, 5, 30) == [(2, 20), (3, 25), (4, 30)]
    assert parts([], 0, 3) == []


def test_a_launch_that_went_back_replaces_the_steps_of_others() -> None:
    """The checkpoints of launch 2 were damaged, so launch 3 began before it."""
    launches = [launch(1, 0, "a"), launch(2, 20, "b"), launch(3, 10, "c")]
    assert parts(launches, 0, 30) == [(1, 10), (3, 30)]


def test_another_validation_may_be_followed() -> None:
    launches = [launch(1, 0, "a"), launch(2, 10, "a", "validate.every_steps=5")]
    assert parts(launches, 0, 12) == [(1, 10), (2, 12)]


def test_a_run_without_a_cfg_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "small"
    run.mkdir()
    (run / "ledger.jsonl").write_text('{"step": 1, "loss": null, "grad_norm": null, "learning_rate": null}\n')
    assert main(["replay", str(run), "--step", "1"]) == 2
    assert "keeps no cfg.py: its Config was made by a program of your own" in capfd.readouterr().err


def test_a_variant_of_a_cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """It imports everything from a neighbour called cfg.py, as its own copy in the run directory is called."""
    write_code(tmp_path, name="cfg.py")
    again = "Config(**{**{name: getattr(config, name) for name in config.model_fields_set}, 'max_steps': 4})"
    (tmp_path / "small.py").write_text(f"from cfg import *\nconfig = {again}\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "cfg", raising=False)
    run = run_in(tmp_path, monkeypatch)
    for changed in (False, True):
        sys.modules.pop("cfg")
        if changed:
            (tmp_path / "cfg.py").write_text("config = 5\n")
        capfd.readouterr()
        assert main(["replay", str(run), "--step", "4", "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["proven_steps"] == 4
    sys.modules.pop("cfg")


@pytest.mark.slow
def test_steps_of_two_launches_with_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first launch's steps are computed with its modules, those after with the modules of the second."""
    write_code(tmp_path)
    run_in(tmp_path, monkeypatch, "max_steps=7")
    write_code(tmp_path, ("nn.Dropout(0.1)", "nn.Dropout(0.2)"), norms="EPS = 0.1\n")
    run = run_in(tmp_path, monkeypatch)
    for name in ("step-00000005", "step-00000007"):
        (run / "checkpoints" / name).rename(tmp_path / name)
    forget_modules(monkeypatch)
    (tmp_path / "norms.py").write_text(NORMS)
    (tmp_path / "small.py").write_text(CFG)
    monkeypatch.setattr(sys, "path", list(sys.path))
    capfd.readouterr()
    assert main(["replay", str(run), "--step", "9", "--json"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert (found["from_step"], found["proven_steps"]) == (7, 2)
    assert found["from"] == "the state after step 7, computed with the code of launch 1"
    assert "steps up to 7 are those of launch 1, which had other code" in err
    assert "computing steps 1 to 7 from the beginning of the run" in err
