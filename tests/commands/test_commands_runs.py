"""`disttrain runs` prints a table for people and JSON for scripts, sorted, and names what is no run."""

import json
from pathlib import Path
from typing import Any

import pytest

from disttrain.commands.main import run_words
from disttrain.commands.runs import MAX_FIELDS, text_of

RUNS = {
    "slow": (0.01, 0.5, 0.75),
    "fast": (0.1, 0.25, 0.875),
    "wild": (1.0, 4.0, 0.125),
    "lost": (0.001, None, None),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write four runs, of which one was killed before its first evaluation."""
    for name, (rate, loss, accuracy) in RUNS.items():
        write(tmp_path / name, {"name": name, "seed": 1, "optimizer.lr": rate}, loss, accuracy)
    return tmp_path


def write(path: Path, fields: dict[str, Any], loss: float | None = None, accuracy: float | None = None) -> None:
    (path / "metrics").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"fields": fields, "hash": "", "folder": None}))
    if loss is not None:
        line = {"step": 8, "epoch": 1, "loss": loss, "accuracy": accuracy}
        (path / "metrics" / "valid.jsonl").write_text(json.dumps(line) + "\n")


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = run_words(["runs", *words])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_table_has_what_differs_and_the_results(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = typed(capsys, str(folder), "--sort", "valid.accuracy")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0
    assert rows == [
        ["name", "status", "step", "optimizer.lr", "valid.loss", "valid.accuracy"],
        ["fast", "stopped", "8", "0.1", "0.25", "0.875"],
        ["slow", "stopped", "8", "0.01", "0.5", "0.75"],
        ["wild", "stopped", "8", "1", "4", "0.125"],
        ["lost", "stopped", "0", "0.001", "-", "-"],
    ]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((), ["fast", "lost", "slow", "wild"]),
        (("--sort", "valid.loss"), ["fast", "slow", "wild", "lost"]),
        (("--sort", "valid.loss", "--reverse"), ["wild", "slow", "fast", "lost"]),
        (("--sort", "optimizer.lr"), ["lost", "slow", "fast", "wild"]),
        (("--sort", "name", "--reverse"), ["wild", "slow", "lost", "fast"]),
        (("--sort", "step"), ["lost", "fast", "slow", "wild"]),
    ],
)
def test_runs_are_sorted_by_any_key(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], names: list[str]
) -> None:
    _, out, _ = typed(capsys, str(folder), *words, "--json")
    runs = json.loads(out)["runs"]
    assert [run["name"] for run in runs] == names
    assert runs[0].keys() == {"name", "path", "status", "step", "differs", "results", "config"}
    assert all(run["differs"] == {"optimizer.lr": RUNS[run["name"]][0]} for run in runs)


def test_an_unknown_key_names_those_there_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = typed(capsys, str(folder), "--sort", "valid.acuracy")
    assert (code, err) == (2, "ConfigError: --sort valid.acuracy: no run has it; did you mean valid.accuracy?\n")
    _, _, err = typed(capsys, str(folder), "--sort", "qqq")
    assert "no run has it; expected a field of the config or a result: valid.loss, valid.accuracy." in err


def test_what_is_no_run_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "notes\x1b[2J").mkdir()
    assert typed(capsys, str(folder))[0] == 0
    (folder / "slow" / "config.json").write_text("{")
    code, out, _ = typed(capsys, str(folder))
    assert code == 1
    assert "notes\\x1b[2J: not a run: it holds no run: it has no config.json" in out
    assert "slow: damaged: " in out
    code, out, _ = typed(capsys, str(folder), "--json")
    assert (code, [Path(each["path"]).name for each in json.loads(out)["not_read"]]) == (1, ["notes\x1b[2J", "slow"])


def test_an_empty_folder_and_one_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(capsys, str(tmp_path), "--sort", "valid.loss") == (0, f"no runs in {tmp_path}\n", "")
    code, out, err = typed(capsys, str(tmp_path / "none"))
    assert (code, out) == (2, "")
    assert err.startswith(f"ConfigError: {tmp_path}/none: expected a folder of runs, such as runs, got No such file")
    assert err.count("\n") == 1


def test_many_fields_are_cut_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        write(tmp_path / name, {f"model.{i}": f"{name}{i}" * 30 for i in range(MAX_FIELDS + 2)})
    _, out, _ = typed(capsys, str(tmp_path))
    assert "2 more fields differ (model.12, model.13 ...): --json" in out
    assert "a0" * 20 in out
    assert "a0" * 21 not in out


def test_values_are_short_texts() -> None:
    assert [text_of(value) for value in (None, 0.1 + 0.2, 3, True, "a", [1, "b"])] == [
        *("-", "0.3", "3", "true", "a", '[1, "b"]'),
    ]
