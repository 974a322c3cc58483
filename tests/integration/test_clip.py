"""examples/clip.py: killed in the middle of an epoch and resumed on other ranks and workers, it has the same bits."""

from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from ranks import Ranks
from rich.console import Console

from disttrain import Config, Events
from disttrain.backend.base import Backend
from disttrain.config import load_config, replace
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.train import train

SHORT = ("max_epochs=none", "max_steps=9", "checkpoint.every_steps=4", "log.every_steps=3", "ledger.every_steps=3")
KILLED_AT = 6
"""An epoch has 14 steps; the last checkpoint before it is that of step 4."""


class Killed(Exception):
    """Ends a life as SIGKILL would."""


def dies(trainer: Any, run: Any) -> None:
    def die(engine: Any) -> None:
        if engine.state.iteration == KILLED_AT:
            raise Killed

    trainer.add_event_handler(Events.ITERATION_COMPLETED, die)


def life(
    backend: Backend, folder: str, killed: bool, words: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]] | None:
    """Train in `folder`; return the result, the ledger and the curves; None if it was killed."""
    config: Config = load_config(ROOT / "examples" / "clip.py", [*SHORT, *words])
    config = replace(config, handlers=[dies]) if killed else config
    directory = RunDirectory(Path(folder))
    try:
        with Preemption(backend, starting=True) as preemption:
            result = train(config, backend, directory, Console(quiet=True), preemption)
    except Killed:
        return None
    return result, [path.read_text() for path in (directory.ledger_jsonl, *sorted(directory.metrics.glob("*.jsonl")))]


def test_killed_and_resumed_on_other_ranks_and_workers(ranks: Ranks, tmp_path: Path) -> None:
    (whole,) = ranks(1, life, str(tmp_path / "whole"), False, ())
    assert whole is not None
    assert whole[0]["status"] == "completed"
    assert '"loss.log_scale": ' in whole[1][0]  # the ledger hashes the temperature
    folder = str(tmp_path / "resized")
    assert ranks(3, life, folder, True, ("strategy=ddp", "num_workers=1")) == [None] * 3
    for result, files in ranks(2, life, folder, False, ("strategy=fsdp", "num_workers=0")):
        assert result["params_sha256"] == whole[0]["params_sha256"]
        assert result["metrics"] == whole[0]["metrics"]
        assert files == whole[1]


@pytest.mark.slow
def test_it_learns_which_caption_belongs_to_a_digit(ranks: Ranks, tmp_path: Path) -> None:
    (trained,) = ranks(1, life, str(tmp_path / "learns"), False, ("max_steps=28",))
    assert trained is not None
    assert trained[0]["metrics"]["retrieval"] > 0.8  # one in ten by chance
