"""Prints a replayed step: its samples, losses and gradient norms by slot, as a table or as JSON."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from disttrain.evidence.ledger import Line
from disttrain.files import json_text, printable
from disttrain.run.replay import Replayed
from disttrain.run.replayed_slots import ReplayedSlot

WIDTH = 160
"""Columns of the output if it is not a terminal."""
SHOWN_SAMPLES = 12
"""The samples of a slot in the table; --json and --slot have all."""


def step_json(run: str, replayed: Replayed) -> str:
    """Return a replayed step as one JSON object."""
    content: dict[str, Any] = {
        "run": run,
        "step": replayed.step,
        "epoch": replayed.epoch,
        "from_step": replayed.start.step,
        "from": str(replayed.start),
        "proven_steps": replayed.num_proven,
        "differs": None if replayed.differs is None else str(replayed.differs),
        "left_out": replayed.left_out,
        **{name: number_of(replayed.line, name) for name in ("loss", "grad_norm", "learning_rate")},
        "slots": [
            {name: value for name, value in vars(slot).items() if name != "update" or value is not None}
            for slot in replayed.slots
        ],
    }
    return json.dumps(json.loads(json_text(content)), indent=2)


def number_of(line: Line, name: str) -> float | None:
    """Return a number of a ledger's line."""
    text = line.get(name)
    return None if text is None else float.fromhex(text)


def print_step(run: str, replayed: Replayed, output: TextIO, *, whole: bool) -> None:
    """Print a replayed step as a table; `whole`: with all samples of a slot."""
    width = None if output.isatty() else WIDTH
    console = Console(file=output, width=width, highlight=False, markup=False, emoji=False)
    start = replayed.start
    is_checkpoint = start.store is not None and not start.label
    begins = f"the checkpoint of step {start.step}" if is_checkpoint else str(start)
    console.print(printable(f"{run}, step {replayed.step} (epoch {replayed.epoch}), from {begins}"), soft_wrap=True)
    console.print(table_of(replayed.slots, whole=whole))
    numbers = {name: number_of(replayed.line, name) for name in ("loss", "grad_norm", "learning_rate")}
    if replayed.line:
        console.print(
            "the whole step: " + ", ".join(f"{name} {value!r}" for name, value in numbers.items()), soft_wrap=True
        )
    first, last = start.step + 1, start.step + replayed.num_proven
    if replayed.num_proven:
        steps = f"step {first} has" if first == last else f"each of the steps {first} to {last} has"
        console.print(f"proven: {steps} the bits of the run's ledger", soft_wrap=True)
    if replayed.differs is not None:
        number = replayed.differs.difference.step
        console.print(f"not the run's bits from step {number} on: it differs from the ledger", soft_wrap=True)
    elif not replayed.line and last < replayed.step:
        console.print(
            f"the ledger has no losses of the slots of step {replayed.step}: without --slot the step is proven too",
            soft_wrap=True,
        )


def table_of(slots: list[ReplayedSlot], *, whole: bool) -> Table:
    """Return the table of a step's slots."""
    columns: dict[str, Callable[[ReplayedSlot], str]] = {}
    if any(each.update is not None for each in slots):
        columns["update"] = lambda each: str(each.update)
    columns |= {
        "slot": lambda each: str(each.slot),
        "loss": lambda each: "-" if each.loss is None else repr(each.loss),
        "grad norm": lambda each: "-" if each.grad_norm is None else f"{each.grad_norm:.6g}",
    }
    if any(each.weight is not None for each in slots):
        columns["weight"] = lambda each: str(each.weight)
    for name in dict.fromkeys(name for each in slots for name in each.values):
        columns[name] = partial(_value_of, name)
    if any(each.sources for each in slots):
        columns["sources"] = lambda each: sources_text(each.sources or [])
    columns["samples"] = lambda each: samples_of(each, whole=whole)
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(
            printable(name), justify="left" if name in ("sources", "samples") else "right", overflow="fold"
        )
    for each in slots:
        table.add_row(*(printable(text(each)) for text in columns.values()))
    return table


def _value_of(name: str, slot: ReplayedSlot) -> str:
    return str(slot.values.get(name, "-"))


def sources_text(sources: list[str]) -> str:
    """Return how many samples each source gives."""
    return ", ".join(f"{name} {sources.count(name)}" for name in dict.fromkeys(sources))


def samples_of(slot: ReplayedSlot, *, whole: bool) -> str:
    """Return the indices of a slot's samples as text."""
    if slot.indices is None:
        return "of a stream"
    shown = slot.indices if whole else slot.indices[:SHOWN_SAMPLES]
    more = len(slot.indices) - len(shown)
    return " ".join(map(str, shown)) + (f" and {more} more" if more else "")
