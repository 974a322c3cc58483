"""Steps of a run on 4 ranks that were killed three times, resized and sharded, computed again in one process."""

import json
import random
import sys
from pathlib import Path

import pytest
from commands import lines, write_cfg

from disttrain.commands.main import main
from disttrain.commands.scenarios import Life, Scenario
from disttrain.commands.start_ranks import PRELOAD
from disttrain.commands.verification import PRELOAD_FSDP, Verification
from disttrain.config import load_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("torch_settings")]

NUM_STEPS = 60
DDP, FSDP = (), ("strategy=fsdp", "checkpoint.asynchronous=true")
MORE = """
def one_cycle(optimizer, total_steps):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=total_steps)
fields.update(schedule=one_cycle, ema={"decay": 0.9}, grad_clip_norm=1.0)
"""


@pytest.mark.parametrize("overrides", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_twenty_random_steps_of_a_run_that_was_killed_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], overrides: tuple[str, ...]
) -> None:
    """Each has every bit of the ledger: samples, losses by slot, gradient norm, learning rate, the whole state."""
    cfg = write_cfg(tmp_path, MORE)
    lives = (
        Life(4, 0, 17, overrides),
        Life(4, 2, 31, overrides),
        Life(4, 1, 45, overrides),
        Life(4, 0, None, overrides),
    )
    preload = (*PRELOAD, *PRELOAD_FSDP)
    verification = Verification(
        cfg, load_config(cfg), [], tmp_path / "runs", num_slots=4, num_steps=NUM_STEPS, preload=preload
    )
    run = verification.run(Scenario("killed", lives)).path
    verification.close()
    ledger = {line["step"]: line for line in lines(run / "ledger.jsonl")}
    monkeypatch.setattr(sys, "path", list(sys.path))
    capfd.readouterr()
    for step in sorted(random.Random(4).sample(range(1, NUM_STEPS + 1), 20)):
        assert main(["replay", str(run), "--step", str(step), "--json"]) == 0
        found = json.loads(capfd.readouterr().out)
        assert found["proven_steps"] == step - found["from_step"] > 0
        assert float(found["loss"]).hex() == ledger[step]["loss"]
        assert [float(slot["loss"]).hex() for slot in found["slots"]] == ledger[step]["slots"]["loss"]
        assert "state" in ledger[step]  # all of it was compared
