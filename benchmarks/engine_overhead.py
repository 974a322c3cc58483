"""Measures the cost of an iteration of the engine, and of a supervised step beside the same step by hand.

One run measures, interleaved so that other load on the machine affects all of them:

- a bare `for` loop over a process function that does nothing;
- an engine without handlers, with five `every=100` handlers, and with one plain handler;
- a training step by hand, and the supervised trainer's.

It measures the same for pytorch-ignite, and the cost that Lightning Fabric and Accelerate add to a DataLoader's
iteration and to the step, if they are installed. It prints medians over the repetitions, with minima in brackets. Times
are CPU times, so other processes affect them less.

    python benchmarks/engine_overhead.py [--json FILE] [--repetitions 200] [--iterations 2000]
"""

import argparse
import importlib
import importlib.util
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

OURS = "disttrain"
ENGINES = {OURS: "disttrain.engine", "pytorch-ignite": "ignite.engine"}
PEERS = {"pytorch-ignite": "ignite", "Lightning Fabric": "lightning_fabric", "Accelerate": "accelerate"}
GOALS = {"no handler": 0.5, "five every=100": 0.3, "one plain": 0.3, "step": 1.02}
STEPS_PER_TIMING = 50  # enough to make the start of a run, 30 us, negligible

Contender = Callable[[], object]


@dataclass
class Figure:
    """One cell of the table: the figure of the median over the repetitions, and that of the quickest ones."""

    who: str
    what: str
    median: float
    minimum: float
    unit: str
    goal: float | None


def nothing(engine: Any, batch: Any) -> None:
    return None


def handler(engine: Any) -> None:
    return None


def bare_loop(data: Any) -> Contender:
    def loop() -> None:
        for batch in data:
            nothing(None, batch)

    return loop


def engine_loop(module: str, data: Any, *filters: dict[str, int] | None) -> Contender:
    """Return a run over data with one handler of ITERATION_COMPLETED for each filter (None: a plain handler)."""
    api = importlib.import_module(module)
    engine = api.Engine(nothing)
    for arguments in filters:
        event = api.Events.ITERATION_COMPLETED
        engine.add_event_handler(event if arguments is None else event(**arguments), handler)

    def run() -> None:
        engine.state.max_epochs = None
        engine.run(data, max_epochs=1)

    return run


Parts = tuple[nn.Module, torch.optim.Optimizer, nn.Module]


def parts() -> Parts:
    """Return a small model, its optimizer and its loss: a step takes a fraction of a millisecond."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4), nn.CrossEntropyLoss()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(64, 64), torch.randint(10, (64,))) for _ in range(STEPS_PER_TIMING)]


def hand_steps(data: Any, shared: Parts) -> Contender:
    model, optimizer, loss_fn = shared
    model.train()

    def loop() -> float:
        output = 0.0
        for x, y in data:
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            output = loss.item()
        return output

    return loop


def trainer_steps(module: str, data: Any, shared: Parts) -> Contender:
    trainer = importlib.import_module(module).create_supervised_trainer(*shared)

    def run() -> None:
        trainer.state.max_epochs = None
        trainer.run(data, max_epochs=1)

    return run


def fabric_contenders(loader: Any, data: Any) -> tuple[Contender, Contender]:
    fabric = importlib.import_module("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    wrapped, (model, optimizer, loss_fn) = fabric.setup_dataloaders(loader), parts()
    model, optimizer = fabric.setup(model, optimizer)

    def steps() -> float:
        output = 0.0
        for x, y in data:
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            fabric.backward(loss)
            optimizer.step()
            output = loss.item()
        return output

    return bare_loop(wrapped), steps


def accelerate_contenders(loader: Any, data: Any) -> tuple[Contender, Contender]:
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
    model, optimizer, loss_fn = parts()
    model, optimizer, wrapped = accelerator.prepare(model, optimizer, loader)

    def steps() -> float:
        output = 0.0
        for x, y in data:
            with accelerator.accumulate(model):
                optimizer.zero_grad()
                loss = loss_fn(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                output = loss.item()
        return output

    return bare_loop(wrapped), steps


def timed(contenders: dict[Any, Contender], repetitions: int, iterations: int) -> dict[Any, list[float]]:
    """Return each contender's microseconds per iteration, one value per repetition; the contenders take turns."""
    times: dict[Any, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()
    for _ in range(repetitions):
        for name, contender in contenders.items():
            began = time.process_time()
            contender()
            times[name].append((time.process_time() - began) / iterations * 1e6)
    return times


def above(times: dict[Any, list[float]], name: Any, base: Any) -> tuple[float, float]:
    """Return the difference of `name` and `base`: of their medians, and of their minima."""
    medians = statistics.median(times[name]) - statistics.median(times[base])
    return medians, min(times[name]) - min(times[base])


def measure_loops(installed: list[str], repetitions: int, iterations: int) -> list[Figure]:
    data = list(range(iterations))
    contenders: dict[Any, Contender] = {"bare": bare_loop(data)}
    for who in (OURS, *installed):
        if who in ENGINES:
            module = ENGINES[who]
            contenders[who, "no handler"] = engine_loop(module, data)
            contenders[who, "five every=100"] = engine_loop(module, data, *[{"every": 100}] * 5)
            contenders[who, "one plain"] = engine_loop(module, data, None)
    times = timed(contenders, repetitions, iterations)
    figures = []
    for who, what in (name for name in contenders if name != "bare"):
        median, minimum = above(times, (who, what), "bare" if what == "no handler" else (who, "no handler"))
        figures.append(Figure(who, what, median, minimum, "us", GOALS[what] if who == OURS else None))
    return figures


def measure_steps(installed: list[str], repetitions: int, iterations: int) -> tuple[list[Figure], float]:
    """Return the ratios of the steps to the step by hand, the cost of wrapped DataLoaders, and the step's time."""
    data, loader = batches(), DataLoader[int](range(iterations), batch_size=None)  # type: ignore[arg-type]
    shared = parts()  # one model for all contenders that do not wrap it: its place in memory affects the times
    steps: dict[Any, Contender] = {"hand": hand_steps(data, shared), OURS: trainer_steps(ENGINES[OURS], data, shared)}
    loops: dict[Any, Contender] = {"hand": bare_loop(loader)}
    if "pytorch-ignite" in installed:
        steps["pytorch-ignite"] = trainer_steps(ENGINES["pytorch-ignite"], data, shared)
    if "Lightning Fabric" in installed:
        loops["Lightning Fabric"], steps["Lightning Fabric"] = fabric_contenders(loader, data)
    if "Accelerate" in installed:
        loops["Accelerate"], steps["Accelerate"] = accelerate_contenders(loader, data)
    times = timed(steps, max(5, repetitions // 4), STEPS_PER_TIMING)
    by_hand = statistics.median(times["hand"])
    figures = [
        Figure(
            who,
            "step",
            statistics.median(times[who]) / by_hand,
            min(times[who]) / min(times["hand"]),
            "ratio",
            GOALS["step"] if who == OURS else None,
        )
        for who in steps
        if who != "hand"
    ]
    if len(loops) > 1:
        times = timed(loops, max(5, repetitions // 10), iterations)
        figures += [Figure(who, "no handler", *above(times, who, "hand"), "us", None) for who in loops if who != "hand"]
    return figures, by_hand


def table(figures: list[Figure], missing: list[str], by_hand: float) -> Table:
    shown = Table(
        title="The cost of an iteration above a bare loop: median (minimum)",
        caption=f"us: microseconds; step: the ratio to the same step by hand, which took {by_hand:.0f} us",
    )
    headings = {"no handler": "no handler, us", "five every=100": "five every=100, us more"}
    headings |= {"one plain": "one plain, us more", "step": "step, ratio"}
    shown.add_column("", no_wrap=True)
    for heading in headings.values():
        shown.add_column(heading, justify="right", no_wrap=True)
    cells = {(figure.who, figure.what): f"{figure.median:.3f} ({figure.minimum:.3f})" for figure in figures}
    for who in (OURS, *PEERS):
        if who in missing:
            shown.add_row(f"{who}: not installed:\npip install disttrain\\[bench]")
        else:
            shown.add_row(who, *(cells.get((who, what), "-") for what in headings))
    shown.add_section()
    shown.add_row("goal: at most", *(str(GOALS[what]) for what in headings))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=2000)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    installed = [who for who, module in PEERS.items() if importlib.util.find_spec(module) is not None]
    figures = measure_loops(installed, arguments.repetitions, arguments.iterations)
    more, by_hand = measure_steps(installed, arguments.repetitions, arguments.iterations)
    figures += more
    missing = [who for who in PEERS if who not in installed]
    console = Console()
    console.width = max(console.width, 132)  # also if the output is a file
    console.print(table(figures, missing, by_hand))
    if arguments.json is not None:
        about = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        result = {"about": about, "step_by_hand_us": by_hand, "figures": [asdict(figure) for figure in figures]}
        arguments.json.write_text(json.dumps({**result, "not_installed": missing}, indent=2) + "\n")


if __name__ == "__main__":
    main()
