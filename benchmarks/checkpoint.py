"""Measures how long a synchronous and an asynchronous save hold the training up, and how fast they write.

Each of the `--ranks` holds a state of `--mb` and saves it through the save handlers of a run, in turns. Each rank
writes its part; with --alone, rank 0 holds and writes all of it. A third of the state is a model, the rest is AdamW's
state of it, as in a run. The times are those of the slowest rank:

- held up: the time of the call, in which an asynchronous save copies the model, and the time for which the next
  update, --step-s later, waits for the copy of the rest;
- written: the time until the checkpoint is committed, beside `dd conv=fsync` of as many bytes in the same turns.

Meanwhile every rank computes matrix products in place of a training, unless --idle. Each save ends before the next one
begins.

    python benchmarks/checkpoint.py [--mb 1000] [--ranks 2] [--rounds 5] [--idle] [--alone] [--step-s 0.5] [--dir /tmp]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from disttrain.backend import Backend, connect
from disttrain.checkpoint import AsynchronousSaver, DirectorySaver
from disttrain.launching.local_ranks import LocalRanks

MB = 10**6
NUM_LAYERS = 17


def state_of(num_bytes: int) -> dict[str, Any]:
    """Return a state of about `num_bytes`, in tensors like those of a model and an optimizer."""
    size = num_bytes // NUM_LAYERS // 3 // 4
    layers = range(NUM_LAYERS)
    moments = {i: {"exp_avg": torch.rand(size), "exp_avg_sq": torch.rand(size)} for i in layers}
    return {"model": {f"layer.{i}": torch.rand(size) for i in layers}, "optimizer": {"state": moments}}


def timed_call(saver: DirectorySaver, state: Any, step: int, backend: Backend) -> float:
    backend.barrier()
    began = time.perf_counter()
    saver(state, f"step-{step:08d}", {})
    return max(backend.all_gather(time.perf_counter() - began))


def next_update(saver: DirectorySaver, weights: torch.Tensor | None, step_s: float, backend: Backend) -> float:
    """Compute a step, or sleep as long; return the seconds for which its update then waits for the copy."""
    if not isinstance(saver, AsynchronousSaver):
        return 0.0
    end = time.perf_counter() + step_s
    while (remaining_s := end - time.perf_counter()) > 0:
        if weights is None:
            time.sleep(remaining_s)
        else:
            torch.mm(weights, weights)
    began = time.perf_counter()
    saver.copied()
    return max(backend.all_gather(time.perf_counter() - began))


def train_until_written(saver: DirectorySaver, weights: torch.Tensor | None) -> int:
    """Compute, or wait, until the save under way is committed; return the number of products computed."""
    count = 0
    job = getattr(saver, "_job", None)
    while job is not None and not job.ended(0.0 if weights is not None else None):
        if weights is not None:
            torch.mm(weights, weights)
            count += 1
    saver.settle()
    return count


def dd(path: Path, num_bytes: int) -> float:
    """Return the seconds that `dd conv=fsync` takes for as many bytes."""
    began = time.perf_counter()
    block = ["dd", "if=/dev/zero", f"of={path}", "bs=8M", f"count={num_bytes // (8 << 20)}", "conv=fsync"]
    subprocess.run(block, check=True, capture_output=True)
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def measure(
    backend: Backend, folder: Path, num_bytes: int, rounds: int, idle: bool, alone: bool, step_s: float
) -> list[dict[str, float]]:
    """Return the times of each turn, in seconds, by name."""
    state = state_of(num_bytes) if backend.rank == 0 or not alone else {}
    weights = None if idle else torch.rand(256, 256)
    turns = []
    savers = {
        "synchronous": DirectorySaver(folder / "sync", backend=backend),
        "asynchronous": AsynchronousSaver(
            folder / "async", backend=backend, later=lambda name: name.startswith("optimizer.state.")
        ),
    }
    for number in range(rounds + 1):  # the first one warms up
        turn: dict[str, float] = {}
        for name, saver in savers.items():
            began = time.perf_counter()
            turn[f"{name} held up, s"] = timed_call(saver, state, number, backend)
            if name == "asynchronous":
                waited_s = next_update(saver, weights, step_s, backend)
                turn["of which at the next update, s"] = waited_s
                turn[f"{name} held up, s"] += waited_s
            train_until_written(saver, weights)
            turn[f"{name} written, s"] = max(backend.all_gather(time.perf_counter() - began))
            saver.remove(f"step-{number - 1:08d}")
            backend.barrier()
        if backend.rank == 0:
            turn["dd conv=fsync, s"] = dd(folder / "dd", num_bytes)
        backend.barrier()
        if number:
            turns.append(turn)
    return turns


def rank_main(arguments: Sequence[Any]) -> int:
    folder, num_bytes, rounds, idle, alone, step_s = arguments
    torch.set_num_threads(1)
    with connect("auto", timeout_s=300) as backend:
        turns = measure(backend, Path(folder), num_bytes, rounds, idle, alone, step_s)
        if backend.rank == 0:
            (Path(folder) / "turns.json").write_text(json.dumps(turns))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle", action="store_true", help="compute nothing while a save is under way")
    parser.add_argument("--alone", action="store_true", help="let rank 0 hold and write the state alone")
    parser.add_argument("--step-s", type=float, default=0.5, help="seconds from a save to the next update (0.5)")
    parser.add_argument("--dir", type=Path, help="a directory on the disk that is to be measured")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="disttrain-benchmark-", dir=options.dir))
    try:
        arguments = (str(folder), options.mb * MB, options.rounds, options.idle, options.alone, options.step_s)
        with LocalRanks(options.ranks, rank_main, (arguments,), folder, ["disttrain.checkpoint"]) as ranks:
            if any(ranks.wait()):
                print(ranks.logs[0].read_text(), file=sys.stderr)
                return 1
        turns = json.loads((folder / "turns.json").read_text())
    finally:
        shutil.rmtree(folder)
    medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    shares = [turn["asynchronous held up, s"] / turn["synchronous held up, s"] for turn in turns]
    rates = {
        name: statistics.median(turn["dd conv=fsync, s"] / turn[f"{name} written, s"] for turn in turns)
        for name in ("synchronous", "asynchronous")
    }
    load = "idle meanwhile" if options.idle else "computing meanwhile"
    writers = "rank 0 writes" if options.alone else "each rank writes its part"
    print(f"{options.mb} MB, {options.ranks} ranks, {writers}, {load}, {os.cpu_count()} cores; median (least, most)")
    for name in medians:
        values = [turn[name] for turn in turns]
        print(f"  {name:31} {medians[name]:7.3f} ({min(values):.3f}, {max(values):.3f})")
    print(f"  asynchronous holds up        {statistics.median(shares):7.1%} of a synchronous save (goal: under 5%)")
    for name, rate in rates.items():
        print(f"  {name + ' writes at':28} {rate:7.2f} of dd's rate (goal: 0.8)")
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None, "dir": None}, "turns": turns}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
