"""Some variants of the zoo by the real command: killed by SIGKILL on three ranks, resumed on two, or refused."""

from pathlib import Path

import pytest
from commands import checkpoints, launch

from disttrain.commands.compare import compare_runs
from disttrain.commands.launch import USAGE
from disttrain.run.directory import RunDirectory

TESTS = Path(__file__).parents[1]
CFG = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {zoo!r}]
from zoo_lives import config_of
from disttrain import Events
from disttrain.config import replace

def dies(trainer, run):
    def die():
        if run.backend.rank == 1 and os.path.exists("die"):
            os.rename("die", "died")
            os.kill(os.getpid(), signal.SIGKILL)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), die)

config = config_of({variant!r})
config = replace(config, strategy={strategy!r}, handlers=(*config.handlers, dies))
"""


def write(folder: Path, variant: str, strategy: str = "ddp") -> None:
    folder.mkdir(exist_ok=True)
    text = CFG.format(tests=str(TESTS), zoo=str(TESTS / "zoo"), variant=variant, strategy=strategy)
    (folder / "cfg.py").write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "strategy"),
    [
        ("zoo_optimizers.own_quantized_state", "ddp"),
        ("zoo_handlers.average_written_back", "fsdp"),
        ("zoo_data.augmented_by_workers", "ddp"),
        ("zoo_schedules.torch_ReduceLROnPlateau", "fsdp"),
    ],
)
def test_killed_by_a_signal_and_resumed_on_fewer_ranks(tmp_path: Path, variant: str, strategy: str) -> None:
    write(tmp_path / "whole", variant)
    assert launch("cfg.py", cwd=tmp_path / "whole").code == 0
    write(tmp_path / "killed", variant, strategy)
    (tmp_path / "killed" / "die").touch()
    assert launch("cfg.py", ranks=3, cwd=tmp_path / "killed").code != 0
    run = tmp_path / "killed" / "runs" / "run"
    assert checkpoints(run)[-1] == 4
    done = launch("cfg.py", ranks=2, cwd=tmp_path / "killed")
    assert done.code == 0, done.text
    compared = compare_runs(RunDirectory(tmp_path / "whole" / "runs" / "run"), RunDirectory(run))
    assert compared.same, compared.difference
    assert (compared.num_steps, compared.num_hashed) == (9, 10)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [0, 2])
def test_a_refused_variant_ends_with_code_2_in_one_line(tmp_path: Path, num_ranks: int) -> None:
    write(tmp_path, "zoo_optimizers.torch_SparseAdam")
    done = launch("cfg.py", ranks=num_ranks, cwd=tmp_path)
    assert done.code == (1 if num_ranks else USAGE)  # torchrun has its own code
    assert "ConfigError: optimizer: SparseAdam.step raised RuntimeError" in done.rank_output()
    assert "Traceback" not in done.rank_output()
