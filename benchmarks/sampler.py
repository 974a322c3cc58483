"""Measures the time and the memory to the first index when a run resumes at the end of an epoch of n samples.

The contenders run each in a process of its own: our `SlotBatchSampler` through `ReproducibleBatchSampler`;
torch.randperm, the least that any shuffle costs which holds its order; torch's DistributedSampler; and pytorch-ignite's
ReproducibleBatchSampler over torch's RandomSampler, if it is installed. Ours is measured at every n. The others are
measured as far as --memory-gib and --seconds allow; the table marks where they are left out. The benchmark also prints
the cost of one index in large slices, the cost of seeding a microbatch, and whether the goals are met.

    python benchmarks/sampler.py [--json FILE] [--memory-gib 4] [--seconds 30]
"""

import argparse
import importlib.util
import json
import multiprocessing
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler

from disttrain.data import IndexShuffle, Microbatch, ReproducibleBatchSampler, SeededDataset, SlotBatchSampler
from disttrain.seeding import seed_for

SIZES = (10**5, 10**6, 10**7, 10**8, 10**9)
BATCH_SIZE = 256
SLICE = 65_536
WORTH_REPEATING_S = 0.2
OURS = "disttrain"


class Sized:
    """A dataset of n samples that are not stored: each is its index."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> int:
        return index


def last_batch_of_ours(n: int) -> Any:
    sampler = SlotBatchSampler(n, BATCH_SIZE)
    return next(iter(ReproducibleBatchSampler(sampler, start_iteration=len(sampler) - 1)))


def last_batch_of_randperm(n: int) -> Any:
    return torch.randperm(n)[-BATCH_SIZE:].tolist()


def last_batch_of_distributed_sampler(n: int) -> Any:
    sampler = DistributedSampler(Sized(n), num_replicas=1, rank=0, shuffle=True)
    batches = iter(BatchSampler(sampler, BATCH_SIZE, drop_last=True))
    for _ in range(n // BATCH_SIZE - 1):
        next(batches)
    return next(batches)


def last_batch_of_ignite(n: int) -> Any:
    from ignite.engine.deterministic import ReproducibleBatchSampler as IgnitesSampler

    batches = BatchSampler(RandomSampler(Sized(n)), BATCH_SIZE, drop_last=True)
    return next(iter(IgnitesSampler(batches, start_iteration=len(batches) - 1)))


@dataclass(frozen=True)
class Contender:
    """A way to reach the last batch, with its approximate cost per sample, which foretells what will not fit."""

    name: str
    last_batch: Callable[[int], Any]
    bytes_per_sample: float
    seconds_per_sample: float


CONTENDERS = (
    Contender(OURS, last_batch_of_ours, 0, 0),
    Contender("torch.randperm", last_batch_of_randperm, 8, 7e-8),
    Contender("DistributedSampler", last_batch_of_distributed_sampler, 60, 4e-7),
    Contender("ignite ReproducibleBatchSampler", last_batch_of_ignite, 80, 7e-7),
)


@dataclass
class Result:
    """The figures of one contender at one n; without figures, `left_out` has the reason."""

    contender: str
    n: int
    first_index_s: float | None = None
    peak_bytes: int | None = None
    left_out: str = ""


def resident_bytes(peak: bool) -> int:
    """Return the resident memory of this process, now or at its peak."""
    line = "VmHWM:" if peak else "VmRSS:"
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(line):
            return int(text.split()[1]) * 1024
    raise RuntimeError(f"expected a line {line} in /proc/self/status")


def measure(contender: Contender, n: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    contender.last_batch(1000)  # imports and first calls are not measured
    before = resident_bytes(peak=False)
    first = best_of(1, lambda: contender.last_batch(n))
    elapsed = min(first, best_of(5, lambda: contender.last_batch(n))) if first < WORTH_REPEATING_S else first
    pipe.send((elapsed, max(0, resident_bytes(peak=True) - before)))


def run(contender: Contender, n: int, memory_bytes: float, seconds: float) -> Result:
    """Measure in a forked process, which has a memory peak of its own."""
    if contender.last_batch is last_batch_of_ignite and importlib.util.find_spec("ignite") is None:
        return Result(contender.name, n, left_out="not installed")
    if contender.bytes_per_sample * n > memory_bytes:
        return Result(contender.name, n, left_out=f"needs about {contender.bytes_per_sample * n / 2**30:.0f} GiB")
    if contender.seconds_per_sample * n > seconds:
        return Result(contender.name, n, left_out=f"takes about {contender.seconds_per_sample * n:.0f} s")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=measure, args=(contender, n, sender))
    process.start()
    sender.close()
    try:
        elapsed, peak = receiver.recv()
    except EOFError:
        return Result(contender.name, n, left_out="ended without a result, probably out of memory")
    finally:
        process.join()
    return Result(contender.name, n, elapsed, peak)


def best_of(repeats: int, work: Callable[[], Any]) -> float:
    """Return the shortest of several times, which other load on the machine lengthens least."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def slices() -> dict[str, float]:
    """Return nanoseconds per index in slices of 65,536, of IndexShuffle at several n and of torch.randperm."""
    nanoseconds = {}
    for n in (10**5, 10**6, 10**9, 2**40 + 1, 10**12):
        order = IndexShuffle(n, 1)
        start = n // 2 if n // 2 + SLICE <= n else 0
        work = lambda order=order, start=start: order.indices(start, min(order.n, start + SLICE))  # noqa: E731
        nanoseconds[f"IndexShuffle n={n:.4g}"] = best_of(20, work) / min(SLICE, n - start) * 1e9
    for n in (10**6, 10**7):
        nanoseconds[f"torch.randperm n={n:.4g}"] = best_of(3, lambda n=n: torch.randperm(n)) / n * 1e9
    return nanoseconds


def goals(results: list[Result]) -> dict[str, tuple[float, float]]:
    """Return the measured value and the goal (an upper bound) of each figure, in the figure's own unit."""
    n = 10**12

    def first_slice() -> Any:
        return IndexShuffle(n, 2).indices(n - BATCH_SIZE, n)

    tracemalloc.start()
    first_slice()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    dataset = SeededDataset(Sized(10**9))

    def seed_a_microbatch() -> Any:
        seed = seed_for(0, "batch", 3, 1000, 5)
        return dataset.__getitems__(Microbatch([1], seed=seed, epoch=3, step=1000, slot=5))

    largest = next(r for r in results if r.contender == OURS and r.n == max(SIZES))
    assert largest.first_index_s is not None, "ours is measured at every n"
    return {
        "first slice at n=10**12, ms": (best_of(50, first_slice) * 1e3, 1.0),
        "memory of it, MB": (peak / 1e6, 1.0),
        "ns an index at n=10**12, slices of 65,536": (slices()["IndexShuffle n=1e+12"], 40.0),
        "resuming at the end of 10**9 samples, ms": (largest.first_index_s * 1e3, 10.0),
        "seeding a microbatch, microseconds": (best_of(1000, seed_a_microbatch) * 1e6, 50.0),
    }


def cell(result: Result) -> str:
    if result.first_index_s is None or result.peak_bytes is None:
        return f"[dim]{result.left_out}[/]"
    return f"{result.first_index_s * 1e3:,.1f} ms\n{result.peak_bytes / 2**20:,.1f} MiB"


def show(console: Console, results: list[Result], per_index: dict[str, float], measured: dict[str, Any]) -> None:
    table = Table(title="To the first index at the end of an epoch of n samples, batches of 256")
    table.add_column("n", justify="right")
    for contender in CONTENDERS:
        table.add_column(contender.name, justify="right")
    for n in SIZES:
        table.add_row(f"{n:.0e}", *(cell(result) for result in results if result.n == n))
    console.print(table)
    table = Table("", "ns per index", title="One index")
    for name, value in per_index.items():
        table.add_row(name, f"{value:.1f}")
    console.print(table)
    table = Table("figure", "measured", "at most", "", title="Goals")
    for name, (value, goal) in measured.items():
        table.add_row(name, f"{value:.3g}", f"{goal:g}", "met" if value <= goal else "[red]MISSED[/]")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--memory-gib", type=float, default=4.0, help="the most memory that a contender may need")
    parser.add_argument("--seconds", type=float, default=30.0, help="the most time that a contender may take at one n")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [run(c, n, args.memory_gib * 2**30, args.seconds) for c in CONTENDERS for n in SIZES]
    per_index = slices()
    measured = goals(results)
    show(Console(), results, per_index, measured)
    if args.json:
        figures = {
            "results": [asdict(result) for result in results],
            "ns_an_index": per_index,
            "bars": {name: {"measured": value, "at_most": goal} for name, (value, goal) in measured.items()},
            "torch": torch.__version__,
        }
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all(value <= goal for value, goal in measured.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
