"""Runs with on_nan=rollback: they go back to a checkpoint and on without the bad step, always with the same bits."""

import os
from pathlib import Path

import pytest
from commands import launch, lines, result, write_cfg
from ranks import Ranks

from disttrain.backend import Backend
from disttrain.checkpoint import load_newest
from disttrain.commands.launch import COMPLETED, FAILED, main
from disttrain.data import SlotBatchSampler
from disttrain.run.rollback import MAX_ROLLBACKS

POISONED, SEED = 17, 5
DIES = """
import os, signal, weakref
from disttrain.engine import Events
models = []
def dies(trainer, run):
    assert not any(model() for model in models), "the model of an earlier attempt is still in memory"
    models.append(weakref.ref(run.model))
    def die():  # at the step that is left out, which no checkpoint and no line of the ledger has recorded yet
        if run.backend.rank == 0 and trainer.state.iteration in run.left_out and os.path.exists("die"):
            os.rename("die", "died")
            if os.path.getsize("died"):
                raise RuntimeError("rank 0 dies")
            os.kill(os.getpid(), signal.SIGKILL)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, die)
fields.update(handlers=[dies], seed=5)
"""
# One sample in 200 is bad: in each of the three epochs it falls into another step.
BAD_SAMPLE = f"""{DIES}
class Poisoned(Noisy):
    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        return (x * torch.inf if i == {POISONED} else x), y
fields["train_data"] = Poisoned
fields["schedule"] = lambda optimizer, total: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=total)
"""
# Item 190 of each pass is in its tenth step. Its loss is finite but far above the others, because its pixels are large.
JUMPS_IN_STREAM = f"""{DIES}
from torch.utils.data import IterableDataset
class Stream(IterableDataset):
    def __iter__(self):
        noisy = Noisy()
        for i in range(200):
            x, y = noisy[i]
            yield (x * 1e4 if i == 190 else x), y
def plain():
    return nn.Linear(64, 10)
fields.update(train_data=Stream, model=plain, global_batch_size=20, max_epochs=None, max_steps=21, spike_factor=20.0)
"""


def command(backend: Backend, folder: str, words: list[str]) -> int:
    """Run the command on a rank of the pool."""
    backend.close()
    os.chdir(folder)
    return main(["cfg.py", "backend=gloo", "on_nan=rollback", *words])


def run(ranks: Ranks, world_size: int, folder: Path, change: str, *words: str, dies: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    write_cfg(folder, change)
    if dies:
        (folder / "die").write_text("raise")
    assert ranks(world_size, command, str(folder), list(words)) == [FAILED if dies else COMPLETED] * world_size
    return folder / "runs" / "small"


def left_out(run: Path) -> dict[int, str]:
    return {line["step"]: line["left_out"] for line in lines(run / "ledger.jsonl") if "left_out" in line}


def same(one: Path, other: Path) -> None:
    for field in ("step", "params_sha256", "metrics", "skipped_steps", "rollbacks"):
        assert result(one)[field] == result(other)[field], field
    for name in ("ledger.jsonl", "metrics/train.jsonl", "metrics/valid.jsonl"):
        assert (one / name).read_text() == (other / name).read_text()


def steps_with_the_bad_sample() -> list[int]:
    sampler = SlotBatchSampler(200, 40, 4, seed=SEED)
    orders = [sampler.samples(epoch, range(5)) for epoch in range(3)]
    return [5 * e + step for e, order in enumerate(orders) for step in range(1, 6) if POISONED in order[step - 1]]


CASES = [
    pytest.param(BAD_SAMPLE, (), id="sample"),
    pytest.param(
        JUMPS_IN_STREAM,
        ("checkpoint.asynchronous=true", "num_workers=1"),
        id="stream-jump",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("change", "words"), CASES)
def test_the_same_bits_on_other_ranks_and_killed_after_going_back(
    tmp_path: Path, ranks: Ranks, change: str, words: tuple[str, ...]
) -> None:
    whole = run(ranks, 1, tmp_path / "whole", change, *words, "log.every_steps=3", "checkpoint.every_steps=4")
    words += ("strategy=fsdp",) * (change == BAD_SAMPLE)
    run(ranks, 2, tmp_path / "killed", change, *words, "log.every_steps=2", "checkpoint.every_steps=3", dies=True)
    assert (tmp_path / "killed" / "died").exists()
    same(whole, run(ranks, 3, tmp_path / "killed", change, *words, "checkpoint.every_steps=5"))

    reasons = left_out(whole)
    assert result(whole)["rollbacks"] == result(whole)["skipped_steps"] == len(reasons) > 1
    position = load_newest(whole / "checkpoints").manifest.position
    assert position["left_out"] == {str(step): reason for step, reason in reasons.items()}
    for line in lines(whole / "metrics/train.jsonl"):
        assert (line["loss"] is None) == (line["grad_norm"] is None) == (line["step"] in reasons)
    if change == BAD_SAMPLE:
        assert reasons == dict.fromkeys(steps_with_the_bad_sample(), "the loss became nan")
        # The learning rate of each step, from a third to the whole in 15 steps: it stays the same at a left-out step.
        rates = [line["learning_rate"] for line in lines(whole / "metrics/train.jsonl")]
        updates = [step - 1 - sum(bad < step for bad in reasons) for step in range(1, 16)]
        assert rates == [pytest.approx(1e-3 * (1 / 3 + 2 / 3 * n / 15)) for n in updates]
    else:
        assert list(reasons) == [10, 20]
        assert all(reason.startswith("the loss jumped to ") for reason in reasons.values())


def test_a_run_whose_every_batch_is_bad_stops(tmp_path: Path) -> None:
    change = """
    class Infinite(Noisy):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return x * torch.inf, y
    fields.update(train_data=Infinite, valid_data=None, name="all")
    """
    write_cfg(tmp_path, change)
    done = launch("cfg.py", "on_nan=rollback", "max_epochs=9", "checkpoint.every_steps=40", cwd=tmp_path)
    assert done.code == FAILED
    assert done.out.count("going back to the start of the run, to run without that step") == MAX_ROLLBACKS
    assert f"NonFiniteError: the run went back to the start of the run {MAX_ROLLBACKS} times" in done.err
    assert "step 11: the loss became nan). The batches are not the cause: lower the learning rate" in done.err
    assert "Traceback" not in done.text
    assert not (tmp_path / "runs/all/result.json").exists()


@pytest.mark.slow
def test_killed_for_good_after_going_back(tmp_path: Path) -> None:
    for name, ranks in (("whole", 0), ("killed", 2)):
        (tmp_path / name).mkdir()
        write_cfg(tmp_path / name, BAD_SAMPLE)
        words = ("cfg.py", "on_nan=rollback", "backend=gloo", "log.every_steps=2")
        if ranks:
            (tmp_path / name / "die").touch()
            assert launch(*words, ranks=ranks, cwd=tmp_path / name).code != 0
            assert (tmp_path / name / "died").exists()
        done = launch(*words, ranks=3 if ranks else 0, cwd=tmp_path / name)
        assert done.code == COMPLETED, done.text
        assert "updates of 3 were left out" in done.out
    same(tmp_path / "whole/runs/small", tmp_path / "killed/runs/small")
