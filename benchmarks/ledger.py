"""Measures the cost of the ledger in a step of about 50 ms, and the time to seed a microbatch.

It trains an MLP of a million parameters with AdamW in one process. The batch is chosen so that a step takes about
50 ms. The ledger is at its default: all numbers at each step, hashes every 100 steps. One run gives two results:

- the time spent inside the ledger, as a share of the time of the steps;
- the ratio of the steps' times with the ledger to those without, in blocks that take turns. Beside it stands the ratio
  of the blocks without the ledger to each other, which shows how much of the ratio is chance.

Times are CPU times of the process on one core, which other load on the machine changes little.

    python benchmarks/ledger.py [--json FILE] [--blocks 6] [--every-steps 100]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from disttrain.backend import connect
from disttrain.data import SlotBatchSampler, StepBatch
from disttrain.engine import Engine, Events, create_supervised_trainer
from disttrain.evidence import Ledger, state_tensors
from disttrain.parallel import SlotGradients, Slots, total_norm
from disttrain.seeding import seed_for, seed_position

WIDTH, DEPTH, NUM_SLOTS = 512, 4, 4
BLOCK = 100
STEP_S = 0.05
GOAL_SHARE, GOAL_SEED_US = 0.01, 50.0


class Timed:
    """Sums the CPU time of the functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.process_time()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.process_time() - began

        return timed


class Bench:
    """One model, trained in blocks of steps with the ledger and without."""

    def __init__(self, every_steps: int, folder: Path) -> None:
        self.every_steps = every_steps
        self.folder = folder
        self.backend = connect("single")
        self.slots = Slots(NUM_SLOTS)
        torch.manual_seed(0)
        self.model = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(DEPTH)])
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.samples = NUM_SLOTS
        self.blocks = 0
        self.norm: Tensor | None = None
        self.block(None, num_steps=5)
        step_s = self.block(None, num_steps=10) / 10
        while step_s < STEP_S:
            self.samples *= 2
            step_s = self.block(None, num_steps=10) / 10
        self.samples = max(1, round(self.samples * STEP_S / step_s / NUM_SLOTS)) * NUM_SLOTS

    def block(self, timed: Timed | None, num_steps: int = BLOCK) -> float:
        """Train `num_steps` steps and return their seconds. With `timed`, write a ledger and time it."""
        gradients = SlotGradients(self.model, self.slots, seed=0)
        trainer = create_supervised_trainer(
            gradients.module,
            self.optimizer,
            nn.functional.mse_loss,
            output_transform=lambda x, y, y_pred, loss: loss.detach(),
            gradients=gradients,
            before_step=None if timed is None else timed(self.take_norm),
        )
        ledger = None if timed is None else self.ledger(timed)
        self.blocks += 1
        if ledger is not None and timed is not None:
            for name in ("step_starts", "step_ends", "fetched"):
                setattr(ledger, name, timed(getattr(ledger, name)))
            ledger.attach(trainer)
            fetched: list[int] = []

            def fetch(engine: Engine) -> None:
                steps = range(len(fetched) + 1, engine.state.iteration + 1)
                fetched.extend(steps)
                norms = self.backend.fetch([self.norm] * len(steps))
                norm_by_step = zip(steps, norms, strict=True)
                lines = [{"step": s, "loss": 0.0, "grad_norm": n, "learning_rate": 1e-3} for s, n in norm_by_step]
                ledger.fetched(lines)

            trainer.add_event_handler(Events.ITERATION_COMPLETED(every=10), fetch)
        x = torch.randn(self.samples // NUM_SLOTS, WIDTH)
        batches = [StepBatch([(x, x)] * NUM_SLOTS, epoch=0, step=i, slots=self.slots.mine) for i in range(num_steps)]
        began = time.process_time()
        trainer.run(batches, max_epochs=1)
        seconds = time.process_time() - began
        if ledger is not None:
            ledger.close()
        return seconds

    def take_norm(self) -> None:
        self.norm = total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def ledger(self, timed: Timed) -> Ledger:
        sampler = SlotBatchSampler(10**6, max(self.samples, NUM_SLOTS), NUM_SLOTS)
        return Ledger(
            self.folder / f"{self.blocks}.jsonl",
            -1,
            backend=self.backend,
            every_steps=self.every_steps,
            state=lambda: state_tensors({"model": self.model}, self.optimizer),
            order=sampler.samples,
        )


def seeding_us(repeats: int = 20_000) -> float:
    """Return the microseconds that it takes to derive and set the seeds of one microbatch."""
    began = time.process_time()
    for step in range(repeats):
        seed_position(seed_for(7, "batch", 3, step, 1))
    return (time.process_time() - began) / repeats * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--every-steps", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.every_steps, Path(folder))
        shares, with_it, without = [], [], []
        for _ in range(options.blocks):
            timed = Timed()
            without.append(bench.block(None))
            with_it.append(bench.block(timed))
            shares.append(timed.seconds / (with_it[-1] - timed.seconds))
    result = {
        "parameters": sum(p.numel() for p in bench.model.parameters()),
        "step_ms": statistics.median(without) / BLOCK * 1e3,
        "share": statistics.median(shares),
        "share_worst": max(shares),
        "ratio": statistics.median(a / b for a, b in zip(with_it, without, strict=True)),
        "ratio_to_itself": statistics.median(a / b for a, b in zip(without[1:], without, strict=False)),
        "seeding_us": min(seeding_us() for _ in range(3)),
    }
    table = Table("figure", "measured", "goal")
    table.add_row(f"a step, {result['parameters']:,} parameters", f"{result['step_ms']:.1f} ms", "")
    table.add_row(
        "inside the ledger, of a step", f"{result['share']:.2%} (worst {result['share_worst']:.2%})", "at most 1%"
    )
    table.add_row("steps with it to steps without", f"{result['ratio']:.3f}", "")
    table.add_row("steps without it to themselves", f"{result['ratio_to_itself']:.3f}", "")
    table.add_row("seeding a microbatch", f"{result['seeding_us']:.1f} us", f"at most {GOAL_SEED_US:.0f} us")
    Console().print(table)
    met = result["share"] <= GOAL_SHARE and result["seeding_us"] <= GOAL_SEED_US
    print("both goals are met" if met else "A GOAL IS MISSED")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
