"""The content of result.json is read as it was written, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from disttrain.errors import ConfigError
from disttrain.run.result import read_result

COMPLETED: dict[str, Any] = {
    "status": "completed",
    "step": 8,
    "epoch": 2,
    "metrics": {"loss": 0.5, "hits": None},
    "params_sha256": "ab",
    "checkpoint": "step-00000008",
    "skipped_steps": 0,
    "samples_per_second": 10,
    "wall_s": 1.5,
}
BEST = {"step": 4, "monitor": "loss", "value": 0.5, "checkpoint": "step-00000004"}


@pytest.mark.parametrize(
    "result",
    [COMPLETED, {**COMPLETED, "best": BEST, "device": "cpu"}, {"status": "interrupted", "step": 0, "metrics": {}}],
)
def test_a_result_is_read_back(tmp_path: Path, result: dict[str, Any]) -> None:
    assert read_result(tmp_path / "result.json") is None
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert read_result(tmp_path / "result.json") == result


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[" * 100_000, "its values lie too deep in each other"),
        ("[1]", "list"),
        ('{"status": "completed"}', "none with a value of step"),
        (json.dumps({**COMPLETED, "wall_s": None}), "wall_s=null"),
        (json.dumps({**COMPLETED, "step": 1e300}), "step=1e+300"),
        (json.dumps({**COMPLETED, "epoch": 10**400}), "epoch=1000"),
        (json.dumps({**COMPLETED, "step": True}), "step=true"),
        (json.dumps({**COMPLETED, "metrics": [1]}), "metrics=[1]"),
        ('{"status": {}}', "status={}"),
        ('{"status": "completed", "step": Infinity}', "Infinity is not a JSON number"),
        ('{"step": 1e999}', "1e999 is too large a number"),
        (json.dumps({**COMPLETED, "best": "step 4"}), 'best="step 4"'),
        (json.dumps({**COMPLETED, "best": {**BEST, "value": "0.5"}}), 'value="0.5"'),
        (json.dumps({**COMPLETED, "best": {}}), "none with a value of step"),
        (json.dumps({**COMPLETED, "best": None}), "best=null"),
    ],
)
def test_a_result_that_no_run_wrote_is_one_clear_error(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "result.json"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_result(file)
    assert str(caught.value).startswith(f"{file}: expected the result of a run, got {problem}")
    assert str(caught.value).endswith("; remove it, and resume the run")
    assert "\n" not in str(caught.value)
