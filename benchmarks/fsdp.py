"""Measures the time that sharded parameters cost, and the memory that they save a rank.

    python benchmarks/fsdp.py [--json FILE] [--worlds 2,4] [--repeats 15] [--muon]

It starts gloo ranks on this machine and trains a small GPT (that of reduction.py) with AdamW and clipping: by
`strategy="ddp"`, by `strategy="fsdp"`, and by FSDP2 as torch ships it, whose gradients have other bits on another
number of ranks. The three take turns in one run, so that other load on the machine affects all of them. The ratio to
ddp is the median of the rounds' ratios. The bytes are those that a rank holds between two steps: parameters and
optimizer states. With `--muon` only the matrices are trained, by Muon: under fsdp each is stepped whole on one rank.
FSDP2 as it is has no such step, and is left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from reduction import GPT, LENGTH, SEQUENCES, VOCABULARY
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from disttrain.backend import Backend, connect, set_cpu_threads
from disttrain.parallel import Slots, World, strategy_for
from disttrain.parallel.groups import groups_of

WARMUPS = 3
CPU = torch.device("cpu")


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Training:
    """The GPT, trained by a strategy of disttrain; `step` is a whole step."""

    def __init__(self, backend: Backend, strategy: Literal["ddp", "fsdp"], num_slots: int, *, muon: bool) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = GPT()
        for parameter in self.model.parameters():
            parameter.requires_grad_(not muon or parameter.ndim == 2)
        slots = Slots(num_slots, backend.rank, backend.world_size)
        world = World(slots=slots, device=CPU, process_group=backend.process_group, fsdp_gather="module")
        chosen = strategy_for(strategy, self.model, world)
        self.layout = chosen.layout
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if muon:
            self.optimizer = torch.optim.Muon(trained)
            self.layout.step_whole(self.optimizer)
        else:
            self.optimizer = torch.optim.AdamW(trained, foreach=True)
        self.gradients = chosen.gradients(self.model, seed=0)
        self.batch = batch_of(backend, slots)

    def step(self) -> None:
        self.optimizer.zero_grad()
        for tokens in self.gradients.microbatches(self.batch, 1):
            loss_of(self.gradients.module, tokens).backward()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        norm = self.layout.total_norm([p.grad for p in parameters if p.grad is not None])
        self.layout.clip(parameters, 1.0, norm)
        self.optimizer.step()


class Plain:
    """FSDP2 as torch ships it, with its own accumulation over a rank's slots, reduction and norm."""

    def __init__(self, backend: Backend, num_slots: int) -> None:
        torch.manual_seed(0)
        self.model: Any = GPT()
        assert backend.process_group is not None
        mesh = DeviceMesh.from_group(backend.process_group, "cpu")
        for module in groups_of(self.model):
            fully_shard(module, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), foreach=True)
        self.batch = batch_of(backend, Slots(num_slots, backend.rank, backend.world_size))

    def step(self) -> None:
        self.optimizer.zero_grad()
        for i, tokens in enumerate(self.batch, start=1):
            self.model.set_requires_gradient_sync(i == len(self.batch))
            self.model.set_reshard_after_backward(i == len(self.batch))
            (loss_of(self.model, tokens) / len(self.batch)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def batch_of(backend: Backend, slots: Slots) -> list[Tensor]:
    generator = torch.Generator().manual_seed(backend.rank)
    return [torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator) for _ in slots.mine]


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    states = [value for kept in optimizer.state.values() for value in kept.values() if isinstance(value, Tensor)]
    held: list[Any] = [*model.parameters(), *states]
    return sum((tensor.to_local() if hasattr(tensor, "to_local") else tensor).nbytes for tensor in held)


def measured(backend: Backend, repeats: int, num_slots: int, *, muon: bool) -> list[dict[str, Any]]:
    """Return a row for each way to train: the median seconds of its step on the slowest rank, and the ratio to ddp."""
    ways: dict[str, Any] = {
        "ddp": Training(backend, "ddp", num_slots, muon=muon),
        "fsdp": Training(backend, "fsdp", num_slots, muon=muon),
    }
    if not muon:
        ways["FSDP2 itself"] = Plain(backend, num_slots)
    calls: list[Callable[[], None]] = [way.step for way in ways.values()]
    rounds = []
    for number in range(WARMUPS + repeats):
        taken = [0.0] * len(calls)
        for i in range(len(calls)):
            turn = (i + number) % len(calls)
            backend.barrier()
            start = time.perf_counter()
            calls[turn]()
            taken[turn] = time.perf_counter() - start
        rounds.append(taken)
    slowest = backend.all_reduce(torch.tensor(rounds[WARMUPS:], dtype=torch.float64), op="max")
    return [
        {
            "ranks": backend.world_size,
            "slots": num_slots,
            "strategy": name,
            "step_s": slowest[:, i].median().item(),
            "ratio": (slowest[:, i] / slowest[:, 0]).median().item(),
            "held_bytes": held_bytes(way.model, way.optimizer),
        }
        for i, (name, way) in enumerate(ways.items())
    ]


def measure(repeats: int, file: Path, *, muon: bool) -> None:
    """Measure on this rank; rank 0 writes the rows."""
    set_cpu_threads(1)
    with connect("gloo") as backend:
        world = backend.world_size
        rows = [row for num_slots in (world, 2 * world) for row in measured(backend, repeats, num_slots, muon=muon)]
        if backend.rank == 0:
            file.write_text(json.dumps(rows))


def start(world: int, repeats: int, *, muon: bool) -> list[dict[str, Any]]:
    """Run `measure` on `world` ranks and return its rows."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        options = ["--repeats", str(repeats), "--rank", str(file), *(["--muon"] if muon else [])]
        subprocess.run([*launch, __file__, *options], check=True)
        rows: list[dict[str, Any]] = json.loads(file.read_text())
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("ranks", "slots", "strategy", "step, ms", "ratio", "held by a rank, MB", title="Sharded parameters")
    for row in rows:
        numbers = (f"{row['step_s'] * 1e3:.1f}", f"{row['ratio']:.2f}", f"{row['held_bytes'] / 1e6:.1f}")
        table.add_row(str(row["ranks"]), str(row["slots"]), row["strategy"], *numbers)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--worlds", default="2,4", help="numbers of ranks")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--muon", action="store_true", help="train the matrices alone, by Muon")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)  # this process is a rank: the file of the rows
    arguments = parser.parse_args()
    if arguments.rank:
        measure(arguments.repeats, arguments.rank, muon=arguments.muon)
        return
    rows = [
        row
        for world in arguments.worlds.split(",")
        for row in start(int(world), arguments.repeats, muon=arguments.muon)
    ]
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
