"""An average that a handler keeps has the same bits in a run that is killed and resized as in an uninterrupted one.

If a handler does not keep its average, `disttrain verify` finds it and names it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment
from resized import NUM_STEPS, run_resized

from disttrain.commands.compare import compare_runs

CFG = Path(__file__).parent / "matrix" / "averaged.py"


@pytest.mark.slow
def test_a_kept_average_has_the_bits_of_an_uninterrupted_run(tmp_path: Path) -> None:
    reference, *others = run_resized(CFG, tmp_path)
    last = json.loads(reference.ledger_jsonl.read_text().splitlines()[-1])["state"]
    names = ("0.weight", "0.bias", "2.weight", "2.bias")
    assert {f"kept.average.tensors.{name}" for name in names} | {"kept.average.num_updates"} <= set(last)
    for run in others:
        compared = compare_runs(reference, run)
        assert compared.same, compared.difference
        assert (compared.num_steps, compared.num_hashed) == (NUM_STEPS, NUM_STEPS + 1)


@pytest.mark.slow
def test_verify_finds_an_average_that_is_not_kept_and_names_it(tmp_path: Path) -> None:
    words = ["verify", CFG, "--worlds", "1", "--workers", "0", "--kills", "1", "--steps", "6", "--quick", "num_slots=4"]
    done = subprocess.run(
        [sys.executable, "-m", "disttrain", *map(str, words)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
        env={**environment(), "KEPT": "0"},
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "a kill loses the state of a handler: average.averaged.tensors['0.weight']" in done.stdout
    assert "Save the object by run.keep(NAME, OBJECT) in the handler" in done.stdout
