"""What does the ledger cost a step of about 50 ms, and how long does seeding a microbatch take?

Trains an MLP of a million parameters with AdamW in one process, its batch chosen so that a step takes about 50 ms, with
the ledger at its default (every number each step, hashes every 100). Two answers from one run: the time spent inside
the ledger as a share of the time of the steps, and the ratio of the steps' times with it and without, in blocks that
take turns (the second beside the ratio of the blocks without to each other, which shows how much of it is chance).
Times are those of the process on one core, which what else the machine does changes little.

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
from disttrain.observe import Ledger, state_tensors
from disttrain.parallel import SlotGradients, Slots, total_norm
from disttrain.seeding import seed_for, seed_position

WIDTH, DEPTH, NUM_SLOTS = 512, 4, 4
BLOCK = 100
STEP_S = 0.05
GOAL_SHARE, GOAL_SEED_US = 0.01, 50.0


class Timed:
    """Adds up the time that the functions spend which it wraps."""

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
        """Train some steps, with the ledger where there is a clock for it; return the seconds they took."""
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
            begun: list[int] = []

            def fetch(engine: Engine) -> None:
                steps = range(len(begun) + 1, engine.state.iteration + 1)
                begun.extend(steps)
                norms = self.backend.fetch([self.norm] * len(steps))
                each = zip(steps, norms, strict=True)
                lines = [{"step": s, "loss": 0.0, "grad_norm": n, "learning_rate": 1e-3} for s, n in each]
                ledger.fetched(lines)

            trainer.add_event_handler(Events.ITERATION_COMPLETED(every=10), fetch)
        x = torch.randn(self.samples // NUM_SLOTS, WIDTH)
        batches = [StepBatch([(x, x)] * NUM_SLOTS, epoch=0, step=i, slots=self.slots.mine) for i in range(num_steps)]
        began = time.process_time()
        trainer.run(batches, max_epochs=1)
        took = time.process_time() - began
        if ledger is not None:
            ledger.close()
        return took

    def take_norm(self) -> None:
        self.norm = total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def ledger(self, timed: Timed) -> Ledger:
        sampler = SlotBatchSampler(10**6, max(self.samples, NUM_SLOTS), NUM_SLOTS)
        return Ledger(
            self.folder / f"{self.blocks}.jsonl",
            -1,
            backend=self.backend,
            every_steps=self.every_steps,
            state=lambda: state_tensors(self.model, self.optimizer),
            order=sampler.samples,
        )


def seeding_us(repeats: int = 20_000) -> float:
    """Return the microseconds that deriving and setting the seeds of one microbatch takes."""
    began = time.process_time()
    for step in range(repeats):
        seed_position(seed_for(7, "batch", 3, step, 1))
    return (time.process_time() - began) / repeats * 1e6


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path)
    options.add_argument("--blocks", type=int, default=6)
    options.add_argument("--every-steps", type=int, default=100)
    given = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given.every_steps, Path(folder))
        shares, with_it, without = [], [], []
        for _ in range(given.blocks):
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
    table = Table("what", "seen", "goal")
    table.add_row(f"a step, {result['parameters']:,} parameters", f"{result['step_ms']:.1f} ms", "")
    table.add_row(
        "inside the ledger, of a step", f"{result['share']:.2%} (worst {result['share_worst']:.2%})", "at most 1%"
    )
    table.add_row("step with it to step without", f"{result['ratio']:.3f}", "")
    table.add_row("step without it to itself", f"{result['ratio_to_itself']:.3f}", "")
    table.add_row("seeding a microbatch", f"{result['seeding_us']:.1f} us", f"at most {GOAL_SEED_US:.0f} us")
    Console().print(table)
    kept = result["share"] <= GOAL_SHARE and result["seeding_us"] <= GOAL_SEED_US
    print("the bars hold" if kept else "A BAR DOES NOT HOLD")
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
