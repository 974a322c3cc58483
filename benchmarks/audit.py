"""Measures what an audited step costs beside an ordinary one, and so the cost of an audit every N steps.

Each rank trains an MLP of a million parameters with AdamW on 4 slots, as a run does: with the same step body, the
comparison of states, and the exchange of microbatches. Ordinary and audited steps take turns in blocks. The overhead is

    (audited step - ordinary step) / ordinary step / N

Times are wall times and CPU times of the process; other load changes the CPU times less. Beside the ratio stands that
of the ordinary blocks to each other, which shows how much of it is chance.

    torchrun --standalone --nproc-per-node 2 benchmarks/audit.py [--json FILE] [--blocks 6] [--every-steps 100]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from disttrain.backend import Backend, connect
from disttrain.data import StepBatch
from disttrain.engine import create_supervised_trainer
from disttrain.evidence import state_tensors, tensor_hashes
from disttrain.parallel import SlotGradients, Slots
from disttrain.parallel.audit import Audit
from disttrain.run.audit import AuditedSteps
from disttrain.run.directory import RunDirectory
from disttrain.run.slot_results import SlotResults

WIDTH, DEPTH, NUM_SLOTS = 512, 4, 4
SAMPLES = 2048
"""Samples of a slot. A hash costs by the parameter and a slot by parameter and sample: fewer samples, more overhead."""
GOAL, GOAL_EVERY = 0.012, 100


class Bench:
    """One model on this rank, trained in blocks of ordinary and of audited steps."""

    def __init__(self, backend: Backend, folder: Path, num_steps: int) -> None:
        self.num_steps = num_steps
        self.backend = backend
        self.slots = Slots(NUM_SLOTS, backend.rank, backend.world_size)
        torch.manual_seed(0)
        self.model = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(DEPTH)])
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.gradients = SlotGradients(self.model, self.slots, seed=0, process_group=backend.process_group)
        self.audit = Audit(self.slots, backend.process_group, every_steps=1, device=backend.device)
        self.audited = AuditedSteps(self.audit, backend, SlotResults(), lambda step: False)
        self.audited.begins(RunDirectory(folder), self.hashes, print)
        self.done = 0

    def hashes(self) -> dict[str, str]:
        return tensor_hashes(state_tensors({"model": self.model}, self.optimizer))

    def block(self, *, audits: bool) -> tuple[float, float]:
        """Train some steps; return the seconds of one in wall time and in CPU time."""
        self.gradients.audit = self.audit if audits else None
        trainer = create_supervised_trainer(
            self.gradients.module,
            self.optimizer,
            nn.functional.mse_loss,
            output_transform=lambda x, y, y_pred, loss: loss.detach(),
            gradients=self.gradients,
            **({"around_step": self.audited.around} if audits else {}),  # type: ignore[arg-type]
        )
        trainer.state.iteration = self.done
        x = torch.randn(SAMPLES, WIDTH)
        mine = self.slots.mine
        batches = [StepBatch([(x, x)] * len(mine), epoch=0, step=i, slots=mine) for i in range(self.num_steps)]
        self.backend.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            self.done += 1
            trainer.state.iteration = self.done
            trainer._process_function(trainer, batch)
        return (time.perf_counter() - began) / self.num_steps, (time.process_time() - cpu) / self.num_steps


def measure(backend: Backend, blocks: int, num_steps: int) -> dict[str, Any]:
    """Return the medians over the blocks of this rank."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(backend, Path(folder), num_steps)
        for audits in (False, True):
            bench.block(audits=audits)  # not counted: memory, checks of the first steps
        ordinary, audited = [], []
        for _ in range(blocks):
            ordinary.append(bench.block(audits=False))
            audited.append(bench.block(audits=True))
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in bench.model.parameters())}
    for kind, name in enumerate(("wall", "cpu")):
        without, with_it = [each[kind] for each in ordinary], [each[kind] for each in audited]
        result |= {
            f"step_ms_{name}": statistics.median(without) * 1e3,
            f"extra_{name}": statistics.median(a / b - 1 for a, b in zip(with_it, without, strict=True)),
            f"chance_{name}": statistics.median(a / b for a, b in zip(without[1:], without, strict=False)),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10, help="steps of a block")
    parser.add_argument("--every-steps", type=int, default=GOAL_EVERY)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with connect("gloo") as backend:
        result = measure(backend, options.blocks, options.steps)
        if backend.rank == 0:
            report(result, backend.world_size, options)


def report(result: dict[str, Any], world_size: int, options: argparse.Namespace) -> None:
    """Print the table of rank 0, and write it."""
    table = Table("figure", "wall time", "CPU time", "goal")
    rows = {
        f"an ordinary step, {result['parameters']:,} parameters, {world_size} ranks": ("step_ms_{}", "{:.1f} ms", 1),
        "what an audited step takes beside it, of an ordinary step": ("extra_{}", "{:.1%}", 1),
        f"overhead with an audit every {options.every_steps} steps": ("extra_{}", "{:.2%}", options.every_steps),
        "ordinary blocks to themselves": ("chance_{}", "{:.3f}", 1),
    }
    for text, (key, form, divisor) in rows.items():
        cells = [form.format(result[key.format(name)] / divisor) for name in ("wall", "cpu")]
        table.add_row(text, *cells, f"at most {GOAL:.1%}" if "overhead" in text else "")
    Console(width=120).print(table)
    print("the goal is met" if result["extra_cpu"] / options.every_steps <= GOAL else "THE GOAL IS MISSED")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
