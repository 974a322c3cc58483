"""Run directories are read as far as they go; a folder that is no run, or damaged, has a reason."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_run import small_config, trained

from disttrain.config import describe, to_json
from disttrain.errors import ConfigError
from disttrain.run.directory import RunDirectory
from disttrain.run.past_runs import TAIL_BYTES, differing_fields, past_runs

HOLDER = """
import sys
from pathlib import Path
from disttrain.run.directory import RunDirectory
directory = RunDirectory(Path(sys.argv[1]))
directory.lock()
print("held", flush=True)
sys.stdin.read()
"""


def write(path: Path, *, result: Any = None, train: str = "", valid: str = "", **changes: Any) -> Path:
    """Write a run directory by hand."""
    (path / "metrics").mkdir(parents=True)
    (path / "config.json").write_text(to_json(small_config(**changes)))
    (path / "metrics" / "train.jsonl").write_text(train)
    (path / "metrics" / "valid.jsonl").write_text(valid)
    if result is not None:
        (path / "result.json").write_text(json.dumps(result))
    return path


def lines(*steps: int, **values: Any) -> str:
    return "".join(json.dumps({"step": step, "epoch": 1, **values}) + "\n" for step in steps)


def test_a_real_run_says_how_it_ended(tmp_path: Path) -> None:
    ended = trained(tmp_path, checkpoint={"monitor": "loss"})
    (tmp_path / "small" / "config.json").write_text(to_json(small_config(checkpoint={"monitor": "loss"})))
    [run], unread = past_runs(tmp_path)
    assert (run.name, run.status, run.step, unread) == ("small", "completed", 8, [])
    assert run.fields == describe(small_config(checkpoint={"monitor": "loss"}))
    assert run.results["valid.loss"] == ended["metrics"]["loss"]
    assert (run.results["best.loss"], run.results["best.step"]) == (ended["best"]["value"], ended["best"]["step"])
    newest = (tmp_path / "small" / "metrics" / "train.jsonl").read_text().splitlines()[-1]
    assert run.results["train.loss"] == json.loads(newest)["loss"]
    assert past_runs(tmp_path / "small") == ([run], [])  # the folder is a run itself


def test_a_run_that_was_killed_is_as_far_as_its_files_go(tmp_path: Path) -> None:
    cut = lines(1, 2, loss=0.5) + '{"step": 3, "lo'
    write(tmp_path / "curves", train=cut, valid=lines(2, accuracy=0.25))
    path = write(tmp_path / "saved", train=lines(4, loss=0.5), result={"status": "interrupted", "step": 3})
    (path / "checkpoints" / "step-00000007").mkdir(parents=True)
    (path / "checkpoints" / ".tmp-step-00000009").mkdir()
    write(tmp_path / "as-said", train=lines(3), result={"status": "interrupted", "step": 3, "metrics": {"loss": 2}})
    write(tmp_path / "empty")
    runs, _ = past_runs(tmp_path)
    assert {run.name: (run.status, run.step, run.results) for run in runs} == {
        "curves": ("stopped", 2, {"train.loss": 0.5, "valid.accuracy": 0.25}),
        "saved": ("stopped", 7, {"train.loss": 0.5}),
        "as-said": ("interrupted", 3, {"valid.loss": 2}),
        "empty": ("stopped", 0, {}),
    }


def test_results_of_several_sets_and_what_is_no_number(tmp_path: Path) -> None:
    values = {"test/loss": 0.5, "top": {"one": 0.1, "five": 0.2}, "matrix": [1, 2], "loss": None, "flag": True}
    write(tmp_path / "a", valid=lines(3, **values))
    [run], _ = past_runs(tmp_path)
    assert run.results == {"valid.test/loss": 0.5, "valid.top.one": 0.1, "valid.top.five": 0.2}
    assert [run.value(key) for key in ("name", "step", "valid.test/loss", "seed", "nothing")] == ["a", 3, 0.5, 5, None]


def test_the_end_of_long_curves_is_read(tmp_path: Path) -> None:
    text = lines(*range(1, 4000), loss=0.5, note="x" * 50)
    assert len(text) > 4 * TAIL_BYTES
    write(tmp_path / "a", train=text)
    assert past_runs(tmp_path)[0][0].step == 3999


def test_a_run_that_a_process_holds_is_running(tmp_path: Path) -> None:
    write(tmp_path / "a", result={"status": "interrupted", "step": 3})
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "a")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert past_runs(tmp_path)[0][0].status == "running"
        assert RunDirectory(tmp_path / "a").is_in_use()
        holder.communicate()
    assert past_runs(tmp_path)[0][0].status == "interrupted"


def test_what_is_no_run_or_damaged_has_a_reason(tmp_path: Path) -> None:
    write(tmp_path / "good")
    (tmp_path / "notes").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a file").write_text("")
    write(tmp_path / "result").joinpath("result.json").write_text("{")
    write(tmp_path / "config").joinpath("config.json").write_bytes(b"\xff")
    runs, unread = past_runs(tmp_path)
    assert [run.name for run in runs] == ["good"]
    assert {each.path.name: each.is_damaged for each in unread} == {"config": True, "notes": False, "result": True}
    assert all("\n" not in each.reason for each in unread)
    assert "it holds no run: it has no config.json" in [each.reason for each in unread]
    with pytest.raises(ConfigError, match="none: expected a folder of runs, such as runs, got No such file"):
        past_runs(tmp_path / "none")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(name=st.sampled_from(["config.json", "result.json", "metrics/train.jsonl"]), content=st.binary(max_size=60))
def test_any_bytes_are_read_or_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / "a"
    if not path.exists():
        write(path, result={"status": "interrupted", "step": 3})
    before = (path / name).read_bytes()
    (path / name).write_bytes(content)
    runs, unread = past_runs(tmp_path)
    (path / name).write_bytes(before)
    assert len(runs) + len(unread) == 1


def test_fields_that_differ_are_in_the_order_of_the_config(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", seed=9, max_epochs=3)
    write(tmp_path / "c", name="other", grad_clip_norm=0.5)
    older = write(tmp_path / "d")
    stored = json.loads((older / "config.json").read_text())
    del stored["fields"]["activation_checkpointing"]  # a release that did not know it
    (older / "config.json").write_text(json.dumps(stored))
    runs, _ = past_runs(tmp_path)
    assert differing_fields(runs) == ["seed", "max_epochs", "grad_clip_norm"]
    assert differing_fields([runs[0], runs[3]]) == []
    assert differing_fields([]) == []
