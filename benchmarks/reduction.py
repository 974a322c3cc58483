"""Measures the cost of a reduction that gives the same bits on any number of ranks.

    python benchmarks/reduction.py [--json FILE] [--worlds 2,4] [--repeats 15]

It starts gloo ranks on this machine and measures:

- the mean of a flat gradient, by `TreeReduce` and as DDP's own hook takes it (a division and `all_reduce`);
- whole training steps of a small GPT, under `SlotGradients` and under plain DDP.

The two ways take turns in one run, so that other load on the machine affects both. The ratio is the median of the
rounds' ratios. Goals: at most 1.25 at 8 MB and more, 1.05 for a step.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

from disttrain.backend import Backend, connect, set_cpu_threads
from disttrain.parallel import SlotGradients, Slots, TreeReduce

NUM_SLOTS = 8
WARMUPS = 3
MEGABYTES = (1, 2, 4, 8, 16, 32)
VOCABULARY, LENGTH, WIDTH, LAYERS, SEQUENCES = 512, 64, 256, 6, 4

Call = Callable[[], object]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.blocks(self.tokens(tokens) + self.places(places)))


def in_turn(backend: Backend, repeats: int, all_reduce: Call, invariant: Call) -> dict[str, float]:
    """Return the median seconds and ratios of the two ways over rounds of three calls, on the slowest rank of each.

    `all_reduce` is called twice per round: its ratio to itself shows how much of the other ratio is chance.
    """
    calls = (all_reduce, invariant, all_reduce)
    seconds: list[list[float]] = []
    for repetition in range(WARMUPS + repeats):
        taken = [0.0] * len(calls)
        for i in range(len(calls)):
            turn = (i + repetition) % len(calls)
            backend.barrier()
            start = time.perf_counter()
            calls[turn]()
            taken[turn] = time.perf_counter() - start
        seconds.append(taken)
    slowest = backend.all_reduce(torch.tensor(seconds[WARMUPS:], dtype=torch.float64), op="max")
    first, new, again = slowest.unbind(dim=1)
    return {
        "all_reduce_s": torch.cat([first, again]).median().item(),
        "invariant_s": new.median().item(),
        "ratio": (2 * new / (first + again)).median().item(),
        "ratio_to_itself": (again / first).median().item(),
    }


def flat_gradients(backend: Backend, repeats: int, megabytes: int) -> dict[str, float]:
    group = backend.process_group
    slots = Slots(NUM_SLOTS, backend.rank, backend.world_size)
    tree = TreeReduce(slots, group)
    size = megabytes * 1024**2 // 4
    parts = {node: torch.ones(size) for node in slots.nodes(backend.rank)}
    flat = torch.ones(size)

    def all_reduce() -> None:
        flat.div_(backend.world_size)
        dist.all_reduce(flat, group=group)

    return in_turn(backend, repeats, all_reduce, lambda: tree.reduce(parts, divisor=NUM_SLOTS))


def gpt_steps(backend: Backend, repeats: int, num_slots: int) -> dict[str, float]:
    slots = Slots(num_slots, backend.rank, backend.world_size)
    models = [GPT(), GPT()]
    invariant = SlotGradients(models[0], slots, seed=0, process_group=backend.process_group)
    plain = DistributedDataParallel(models[1], process_group=backend.process_group, gradient_as_bucket_view=True)
    optimizers = [torch.optim.AdamW(model.parameters(), foreach=True) for model in models]
    generator = torch.Generator().manual_seed(backend.rank)
    batch = [torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator) for _ in slots.mine]

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def step_invariant() -> None:
        optimizers[0].zero_grad()
        for tokens in invariant.microbatches(batch, 1):
            loss(invariant.module, tokens).backward()
        optimizers[0].step()

    def step_plain() -> None:
        optimizers[1].zero_grad()
        with plain.no_sync():
            for tokens in batch[:-1]:
                (loss(plain, tokens) / len(batch)).backward()
        (loss(plain, batch[-1]) / len(batch)).backward()
        optimizers[1].step()

    return in_turn(backend, repeats, step_plain, step_invariant)


def measure(repeats: int, file: Path) -> None:
    """Measure on this rank; rank 0 writes the rows."""
    set_cpu_threads(1)
    with connect("gloo") as backend:
        world = backend.world_size
        rows = [
            {"what": f"{megabytes} MB", "ranks": world, **flat_gradients(backend, repeats, megabytes)}
            for megabytes in MEGABYTES
        ]
        for num_slots in (world, NUM_SLOTS):
            row = gpt_steps(backend, repeats, num_slots)
            rows.append({"what": f"GPT, {num_slots} slots", "ranks": world, **row})
        if backend.rank == 0:
            file.write_text(json.dumps(rows))


def start(world: int, repeats: int) -> list[dict[str, Any]]:
    """Run `measure` on `world` ranks and return its rows."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        subprocess.run([*launch, __file__, "--repeats", str(repeats), "--rank", str(file)], check=True)
        rows: list[dict[str, Any]] = json.loads(file.read_text())
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("ranks", "reduced", "all_reduce, ms", "invariant, ms", "ratio", "to itself")
    table = Table(*columns, title="The same bits on any number of ranks")
    for row in rows:
        times = [f"{row[name] * 1e3:.2f}" for name in ("all_reduce_s", "invariant_s")]
        ratios = [f"{row[name]:.2f}" for name in ("ratio", "ratio_to_itself")]
        table.add_row(str(row["ranks"]), row["what"], *times, *ratios)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--worlds", default="2,4", help="numbers of ranks")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)  # this process is a rank: the file of the rows
    arguments = parser.parse_args()
    if arguments.rank:
        measure(arguments.repeats, arguments.rank)
        return
    rows = [row for world in arguments.worlds.split(",") for row in start(int(world), arguments.repeats)]
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
