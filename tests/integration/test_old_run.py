"""This release resumes a run that an earlier release began, with the same bits."""

import json
import shutil
from pathlib import Path

import pytest
from commands import launch

OLD = Path(__file__).parents[1] / "run" / "old_run"


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_that_disttrain_7a2b9a5_began_ends_with_the_same_bits(tmp_path: Path, ranks: int) -> None:
    shutil.copytree(OLD / "killed", tmp_path / "killed")
    done = launch("killed", ranks=ranks, cwd=tmp_path)
    assert done.code == 0, done.text
    assert "resuming from step 6" in done.out
    for name in ("ledger.jsonl", "metrics/train.jsonl", "metrics/valid.jsonl"):
        assert (tmp_path / "killed" / name).read_text() == (OLD / "whole" / name).read_text(), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "killed", OLD / "whole")]
    for name in ("params_sha256", "metrics", "best", "step"):
        assert results[0][name] == results[1][name], name
