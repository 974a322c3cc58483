"""`disttrain compare` over run directories: its exit code and its lines, whichever run is named first."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from disttrain.commands.compare import compare_command, compare_runs
from disttrain.commands.exit_codes import DIFFERENT, SAME, USAGE
from disttrain.run.directory import RunDirectory
from disttrain.run.launches import LaunchRecord, keep_launch, read_launches, record_files
from disttrain.run.source_files import SourceFile

NUM_STEPS = 6


def write_run(
    path: Path,
    *,
    num_steps: int = NUM_STEPS,
    bad_step: int | None = None,
    seed: int = 0,
    evaluations: dict[int, dict[str, Any]] | None = None,
    values: dict[int, dict[str, Any]] | None = None,
    **result: Any,
) -> Path:
    """Write the files of a run that `compare` reads; at `bad_step` its loss is another one."""
    path.mkdir()
    run = RunDirectory(path)
    lines: list[dict[str, Any]] = [{"step": 0, "epoch": 0, "state": {"model.a": "0"}}]
    for step in range(1, num_steps + 1):
        loss = (2.0 if step == bad_step else 1 / step).hex()
        lines.append({"step": step, "epoch": 1, "order": f"o{step}", "loss": loss, "grad_norm": None})
        lines[-1] |= {"learning_rate": (0.1).hex(), "slots": {"batch": ["x"], "loss": [loss]}}
        lines[-1]["state"] = {"model.a": str(step)}
    run.ledger_jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = {"name": path.name, "seed": seed, "metrics.rate": "torchmetrics.MeanMetric"}
    run.config_json.write_text(json.dumps({"fields": fields, "hash": "", "folder": None}))
    if result:
        run.result_json.write_text(json.dumps(result))
    run.metrics.mkdir()
    of_steps = [{"step": step, "epoch": 1, **results} for step, results in (evaluations or {}).items()]
    (run.metrics / "valid.jsonl").write_text("".join(json.dumps(line) + "\n" for line in of_steps))
    curve = [{"step": step, "epoch": 1, "loss": 1 / step, **more} for step, more in (values or {}).items()]
    (run.metrics / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curve))
    return path


@pytest.fixture
def one(tmp_path: Path) -> Path:
    evaluations = {3: {"loss": 0.75, "rate": 0.25}, NUM_STEPS: {"loss": 0.5, "rate": 0.5}}
    best = {"step": NUM_STEPS, "monitor": "loss", "value": 0.5, "checkpoint": "step-00000006"}
    return write_run(tmp_path / "one", evaluations=evaluations, step=NUM_STEPS, params_sha256="abc", best=best)


def compare(*runs: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = compare_command(*runs)
    return (code, *capsys.readouterr())


def test_runs_without_a_difference(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(one, two := tmp_path / "two")
    for runs in ((one, two), (two, one), (one, one)):
        code, out, err = compare(*runs, capsys=capsys)
        assert (code, err) == (SAME, "")
        assert out == f"the same bits: {NUM_STEPS} steps, the whole state at {NUM_STEPS + 1} of them\n"


@pytest.mark.parametrize("bad_step", [1, 4, NUM_STEPS])
def test_the_first_step_that_differs(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad_step: int
) -> None:
    two = write_run(tmp_path / "two", bad_step=bad_step, seed=5)
    for runs, seeds in (((one, two), "0 and 5"), ((two, one), "5 and 0")):
        code, out, _ = compare(*runs, capsys=capsys)
        assert code == DIFFERENT
        first, second, third = out.splitlines()
        assert first == f"the configs differ in seed: {seeds}"
        assert second.startswith(f"first difference at step {bad_step}: the loss (slot 0): ")
        assert f"The state was the same after step {bad_step - 1}." in third


def test_weights_that_differ_after_the_last_step(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = write_run(tmp_path / "two", step=NUM_STEPS, params_sha256="xyz")
    code, out, _ = compare(one, two, capsys=capsys)
    assert code == DIFFERENT
    assert f"all {NUM_STEPS} steps are the same in the ledgers, but the weights at the end are abc and xyz" in out


@pytest.mark.parametrize("last", ["loss", "rate"])
def test_an_evaluation_that_differs_is_a_difference_of_its_step(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], last: str
) -> None:
    evaluations = {3: {"loss": 0.75, "rate": 0.25}, NUM_STEPS: {"loss": 0.5, "rate": 0.5, last: 0.875}}
    two = write_run(tmp_path / "two", evaluations=evaluations)
    code, out, _ = compare(one, two, capsys=capsys)
    assert code == DIFFERENT
    first, second = out.splitlines()
    start = f"first difference at step {NUM_STEPS}: the results of the evaluation after the step"
    assert first == f"{start} ({last}): 0.5 and 0.875"
    assert "the weights" in second
    assert "so the evaluation depends on something else" in second
    bad = write_run(tmp_path / "bad", evaluations=evaluations, bad_step=NUM_STEPS)  # the cause comes first
    assert f"first difference at step {NUM_STEPS}: the loss" in compare(one, bad, capsys=capsys)[1]


def test_a_value_beside_the_loss_that_differs_is_a_difference_of_its_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / name, values={2: {"ce": 0.5}, 4: {"ce": ce}}) for name, ce in (("a", 0.5), ("b", 1.0))]
    code, out, _ = compare(*runs, capsys=capsys)
    assert code == DIFFERENT
    first, second = out.splitlines()
    assert first == "first difference at step 4: the values beside the loss (ce): 0.5 and 1.0"
    assert "a value that the forward returns, or a metric in train_metrics, depends on something else" in second


def test_a_metric_may_be_rounded_otherwise_on_other_ranks_but_not_the_loss(one: Path, tmp_path: Path) -> None:
    for name in ("rate", "loss"):
        rounded = {"loss": 0.75, "rate": 0.25, name: math.nextafter({"loss": 0.75, "rate": 0.25}[name], 1.0)}
        two = RunDirectory(write_run(tmp_path / name, evaluations={3: rounded}))
        assert not compare_runs(RunDirectory(one), two, same_ranks=True).same
        found = compare_runs(RunDirectory(one), two)
        assert found.same == (name == "rate")
        assert [text.split()[0] for text in found.rounding] == ["rate"] * (name == "rate")


def test_another_best_evaluation_is_a_difference(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = {"step": 3, "monitor": "loss", "value": 0.75, "checkpoint": "step-00000003"}
    two = write_run(tmp_path / "two", step=NUM_STEPS, params_sha256="abc", best=best)
    code, out, _ = compare(one, two, capsys=capsys)
    assert code == DIFFERENT
    assert f"but the best evaluations are step {NUM_STEPS} (loss 0.5) and step 3 (loss 0.75)" in out


def test_only_common_steps_are_compared(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longer = write_run(tmp_path / "longer", num_steps=NUM_STEPS + 3, bad_step=NUM_STEPS + 2)
    code, out, _ = compare(one, longer, capsys=capsys)
    assert code == SAME
    assert f"{one} has {NUM_STEPS} steps, {longer} has {NUM_STEPS + 3}; the common steps are compared\n" in out
    assert f"the same bits: {NUM_STEPS} steps" in out


def test_folders_that_cannot_be_compared(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = write_run(tmp_path / "begun", num_steps=0)
    no_config = write_run(tmp_path / "no_config")
    (no_config / "config.json").unlink()
    for other, words in (
        (tmp_path / "none", "expected a run's ledger at "),
        (begun, "have no step in common; let both runs do the same steps"),
        (no_config, f"expected a run directory, got {no_config}, whose config.json cannot be read"),
    ):
        for runs in ((one, other), (other, one)):
            code, out, err = compare(*runs, capsys=capsys)
            assert (code, out) == (USAGE, "")
            assert err.startswith("ConfigError: ")
            assert words in err


DEEP = "[" * 100_000
LINE = {"step": 1, "epoch": 1, "loss": "0x1p+0", "grad_norm": None, "learning_rate": None}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (DEEP, "recursion limit exceeded"),
        ("[1]", "got Input should be an object"),
        (json.dumps({**LINE, "step": "1"}), "got 'step': Input should be a valid integer"),
        (json.dumps({**LINE, "step": 10**30}), "got 'step': Input should be"),
        (json.dumps({**LINE, "step": [1]}), "got 'step': Input should be a valid integer"),
        (json.dumps({**LINE, "loss": {"a": 1}}), "got 'loss': Input should be a valid string"),
        (json.dumps({**LINE, "slots": {"batch": []}}), "got 'slots.loss': Field required"),
        (json.dumps({**LINE, "state": ["a"]}), "got 'state': Input should be"),
        (json.dumps({"step": 1, "loss": None}), "it has no grad_norm"),
        ('{"step": 1e999}', "got 'step': Input should be"),
    ],
)
def test_a_damaged_ledger_is_one_clear_error(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, words: str
) -> None:
    other = write_run(tmp_path / "other")
    lines = (other / "ledger.jsonl").read_text().splitlines()
    (other / "ledger.jsonl").write_text("\n".join([*lines[:3], damage, *lines[3:]]) + "\n")
    for runs in ((one, other), (other, one)):
        code, out, err = compare(*runs, capsys=capsys)
        assert (code, out) == (USAGE, "")
        assert err.startswith(f"ConfigError: {other}/ledger.jsonl, line 4: expected the results of a step, got ")
        assert words in err
        assert err.count("\n") == 1
    (other / "ledger.jsonl").write_text("\n".join([*lines, damage[:50]]))  # a kill cut the last line short
    assert compare(one, other, capsys=capsys)[0] == SAME


def test_a_number_beyond_all_floats_is_shown_as_it_is(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other")
    text = (other / "ledger.jsonl").read_text()
    (other / "ledger.jsonl").write_text(
        text.replace('"loss": "0x1.0000000000000p+0"', '"loss": "0x1p+99999\\u001b[2J"')
    )
    code, out, _ = compare(one, other, capsys=capsys)
    assert code == DIFFERENT
    assert "1.0 (0x1.0000000000000p+0) and 0x1p+99999\\x1b[2J" in out


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("result.json", DEEP),
        ("result.json", "[]"),
        ("result.json", '{"step": 1e999}'),
        ("result.json", '{"status": "completed", "step": 1}'),
        ("config.json", DEEP),
        ("config.json", "\x00"),
    ],
)
def test_other_damaged_files_are_one_clear_error(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str
) -> None:
    other = write_run(tmp_path / "other")
    (other / file).write_text(content)
    for runs in ((one, other), (other, one)):
        code, out, err = compare(*runs, capsys=capsys)
        assert (code, out) == (USAGE, "")
        assert err.startswith(f"ConfigError: {other / file}: expected the ")
        assert err.count("\n") == 1


def keep_code(run: Path, step: int, text: str, torch: str = "2.9") -> None:
    """Keep a launch of the run with this cfg.py."""
    data = text.encode()
    file = SourceFile("cfg.py", len(data), hashlib.sha256(data).hexdigest(), data)
    record = LaunchRecord(step=step, files=record_files({"cfg.py": file}), versions={"torch": torch})
    keep_launch(run / "launches", record, {"cfg.py": file}, read_launches(run / "launches", run / "cfg.py"))


def test_the_code_of_the_launches_that_did_the_first_step_that_differs(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = write_run(tmp_path / "two", bad_step=4)
    for run, step, text in ((one, 0, "a\nlr = 1\n"), (two, 0, "a\nlr = 1\n"), (two, 2, "a\nlr = 2\n"), (two, 5, "b")):
        keep_code(run, step, text)
    lines = compare(one, two, capsys=capsys)[1].splitlines()
    assert lines[0] == "the runs differ in cfg.py (+1 -1)"
    assert lines[1:7] == [f"--- {one}/cfg.py", f"+++ {two}/cfg.py", "@@ -1,2 +1,2 @@", " a", "-lr = 1", "+lr = 2"]
    assert lines[7].startswith("first difference at step 4")
    lines = compare(two, one, capsys=capsys)[1].splitlines()
    assert lines[5:7] == ["-lr = 2", "+lr = 1"]


def test_code_that_is_the_same_or_not_kept_is_not_mentioned(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = write_run(tmp_path / "two", bad_step=4)
    keep_code(one, 0, "a\n")
    assert compare(one, two, capsys=capsys)[1].startswith("first difference")
    keep_code(two, 0, "a\n")
    assert compare(one, two, capsys=capsys)[1].startswith("first difference")
    (two / "launches" / "0001" / "launch.json").write_text("[" * 100_000)
    assert compare(one, two, capsys=capsys)[1].startswith("first difference")


def test_versions_that_differ_are_mentioned_of_runs_with_the_same_bits(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = write_run(tmp_path / "two")
    keep_code(one, 0, "a\n", torch="2.9")
    keep_code(two, 0, "a\n", torch="2.13")
    code, out, _ = compare(one, two, capsys=capsys)
    assert code == SAME
    assert out.splitlines()[0] == f"the runs differ in torch: 2.9 in {one}, 2.13 in {two}"
