"""Runs of one config: the reference on one rank, a run that is killed and resized, and one that is sharded too."""

from pathlib import Path

from disttrain.commands.scenarios import Life, Scenario
from disttrain.commands.start_ranks import PRELOAD
from disttrain.commands.verification import PRELOAD_FSDP, Verification
from disttrain.config import load_config
from disttrain.run.directory import RunDirectory

NUM_STEPS = 8
FSDP = ("strategy=fsdp", "checkpoint.asynchronous=true")
SCENARIOS = (
    Scenario("reference", (Life(1, 0),)),
    Scenario("resized", (Life(2, 0, 3), Life(3, 1))),
    Scenario("sharded", (Life(2, 0, 3, FSDP), Life(1, 0, 6), Life(3, 0, None, FSDP))),
)


def run_resized(cfg: Path, folder: Path) -> list[RunDirectory]:
    """Run the scenarios with `cfg`, NUM_STEPS steps each, below `folder`; return their directories in that order."""
    preload = (*PRELOAD, *PRELOAD_FSDP)
    verification = Verification(cfg, load_config(cfg), [], folder, num_slots=4, num_steps=NUM_STEPS, preload=preload)
    return [verification.run(scenario) for scenario in SCENARIOS]
