"""A rank that hangs ends the run within `timeout_s`, with one message: the rank, its place and the ranks that wait."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from commands import launch, start, write_cfg

# Rank 1 sleeps while it loads a sample of the second epoch, much longer than `timeout_s`.
HANGS = """
import time
class Hangs(Noisy):
    loaded = 0
    def __getitem__(self, i):
        import torch.distributed as dist
        Hangs.loaded += 1
        if Hangs.loaded == 110 and dist.get_rank() == 1:
            time.sleep(600)
        return super().__getitem__(i)
fields["train_data"] = Hangs
fields["timeout_s"] = 4
"""


def test_a_rank_that_hangs_while_loading_is_named(tmp_path: Path) -> None:
    write_cfg(tmp_path, HANGS)
    began = time.monotonic()
    done = launch("cfg.py", ranks=2, cwd=tmp_path)
    assert done.code == 1
    assert time.monotonic() - began < 90  # and not 600
    output = done.rank_output()
    assert output.count("HangError: no progress for ") == 1, output
    assert "is loading the batch of step 6, at " in output
    assert "cfg.py:" in output
    assert "in __getitem__; rank 0 waits for it." in output
    assert "Last collectives: rank 0: " in output
    assert ". rank 1: " in output
    assert "the gradients of step 5 have met" in output  # on rank 1, which loads for step 6
    assert "the gradients of step 6 are on their way" in output  # on rank 0
    assert "Traceback" not in output
    assert "frame #" not in output
    assert "time.sleep" in (tmp_path / "cfg.py").read_text()
    assert "in __getitem__" in (tmp_path / "runs/small/logs/rank-1.stacks.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named(tmp_path: Path) -> None:
    change = """
    import os, pathlib
    from disttrain.engine import Events
    def write_pid(trainer, run):
        mark = pathlib.Path(f"pid-{run.backend.rank}")
        trainer.add_event_handler(Events.STARTED, lambda: mark.write_text(str(os.getpid())))
    fields["handlers"] = [write_pid]
    fields["timeout_s"] = 5
    fields["max_epochs"] = 100000
    """
    write_cfg(tmp_path, change)
    process = start("cfg.py", ranks=2, cwd=tmp_path)
    try:
        until = time.monotonic() + 90
        while not (tmp_path / "runs/small/checkpoints/step-00000005").exists() and time.monotonic() < until:
            time.sleep(0.1)
        stopped = int((tmp_path / "pid-1").read_text())
        os.kill(stopped, signal.SIGSTOP)
        out, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    assert out.count("HangError: no progress for ") == 1, out
    assert "rank 1 did not answer: stopped, cut off, or busy in a library; rank 0 waits for it" in out
    assert json.loads((tmp_path / "runs/small/logs/rank-0.hang.json").read_text())["waits"]


# A stream without a state of its own, so slow that reading it up to a later step takes longer than `timeout_s`.
SLOW_STREAM = """
import time
from torch.utils.data import IterableDataset
class Slow(IterableDataset):
    def __iter__(self):
        for i in range(1000):
            time.sleep(0.02)
            yield torch.randn(64), i % 10
fields.update(train_data=Slow, valid_data=None, max_epochs=None, max_steps=8, timeout_s=4)
"""


@pytest.mark.slow
def test_reading_a_stream_up_to_the_position_of_the_run_is_no_hang(tmp_path: Path) -> None:
    write_cfg(tmp_path, SLOW_STREAM)
    first = launch("cfg.py", "max_steps=8", cwd=tmp_path)
    assert first.code == 0, first.text
    began = time.monotonic()
    done = launch("cfg.py", "max_steps=9", cwd=tmp_path)
    assert done.code == 0, done.text
    assert "resuming from step 8" in done.out
    assert time.monotonic() - began > 4  # longer than `timeout_s`
