"""Whole runs with sharded parameters, killed, resized, and changed to ddp and back: the bits are those of DDP.

Ranks are real gloo processes that run the launcher; kills are SIGKILLs.
"""

from pathlib import Path

import pytest

from disttrain.commands.compare import compare_runs
from disttrain.commands.scenarios import Life, Scenario
from disttrain.commands.start_ranks import PRELOAD
from disttrain.commands.verification import PRELOAD_FSDP, Verification
from disttrain.config import load_config
from disttrain.run.directory import RunDirectory

CONFIGS = Path(__file__).parent / "matrix"
NUM_STEPS = 12
FSDP = ("strategy=fsdp", "checkpoint.asynchronous=true")
SHARDS = (*PRELOAD, *PRELOAD_FSDP)

# Each life resumes from a checkpoint of another strategy on another number of ranks.
SCENARIOS = [
    Scenario("reference", (Life(2, 0),)),
    Scenario("sharded", (Life(2, 0, 5, FSDP), Life(3, 1, 9, ("strategy=ddp",)), Life(3, 0, None, FSDP))),
]


@pytest.mark.parametrize("model", ["sharded", pytest.param("gpt", marks=pytest.mark.slow)])
def test_killed_resized_and_sharded_anew_gives_the_bits_of_ddp(model: str, tmp_path: Path) -> None:
    cfg = CONFIGS / f"{model}.py"
    verification = Verification(cfg, load_config(cfg), [], tmp_path, num_slots=8, num_steps=NUM_STEPS, preload=SHARDS)
    reference, run = (verification.run(scenario) for scenario in SCENARIOS)
    compared = compare_runs(reference, run)
    assert compared.same, compared.difference
    assert (compared.num_steps, compared.num_hashed) == (NUM_STEPS, NUM_STEPS + 1)
    for name in ("ledger.jsonl", "metrics/train.jsonl", "metrics/valid.jsonl"):
        assert (run.path / name).read_bytes() == (reference.path / name).read_bytes(), name
    assert bool((run.path / "metrics/valid.jsonl").read_text()) == (model == "sharded")
    weights = [(directory.result() or {})["params_sha256"] for directory in (reference, run)]
    assert weights[0] == weights[1]
    assert num_files(reference) == 1
    assert num_files(run) == 3  # each rank has written its part


def num_files(run: RunDirectory) -> int:
    newest = max(run.checkpoints.glob("step-*"))
    return len(list(newest.glob("*.safetensors")))
