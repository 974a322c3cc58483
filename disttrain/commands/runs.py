"""`disttrain runs [DIR]`: list the runs of a folder, what differs in their configs, and their results.

*Contract*: nothing is changed. Exit code 0: done; 1: a run is damaged, and named; 2: the command cannot be run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from disttrain.commands.exit_codes import ALL_GOOD, DAMAGE_FOUND, USAGE
from disttrain.config.wording import did_you_mean
from disttrain.errors import ConfigError
from disttrain.files import json_text, printable
from disttrain.run.past_runs import PastRun, Unread, differing_fields, past_runs

WIDTH_OF_A_PIPE = 4000
"""Columns of the output if it is not a terminal: each run is one line."""
MAX_FIELDS, MAX_TEXT = 12, 40
"""The fields that a table shows at most, and the longest text of a value in it."""
OF_EVERY_RUN = ("name", "status", "step")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = runs_parser().parse_args(arguments)
    try:
        runs, unread = past_runs(options.dir)
        fields = differing_fields(runs)
        if options.sort:
            runs = in_order(runs, options.sort, backwards=options.reverse)
    except ConfigError as error:
        print(f"ConfigError: {printable(str(error))}", file=sys.stderr)
        return USAGE
    if options.json:
        print(as_json(runs, unread, fields))
    else:
        width = None if sys.stdout.isatty() else WIDTH_OF_A_PIPE
        show(Console(highlight=False, markup=False, emoji=False, width=width), options, runs, unread, fields)
    return DAMAGE_FOUND if any(each.is_damaged for each in unread) else ALL_GOOD


def runs_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="disttrain runs",
        description="List the runs of a folder: status, step, the fields in which their configs differ, and results.",
        epilog="exit codes: 0: done; 1: a run is damaged; 2: the command cannot be run",
    )
    parser.add_argument("dir", metavar="DIR", nargs="?", type=Path, default=Path("runs"), help="default: runs")
    parser.add_argument(
        "--sort",
        metavar="KEY",
        help="a result such as valid.accuracy (the largest first; of a loss the smallest), a field such as "
        "optimizer.lr, name, status or step (the smallest first); runs without it come last",
    )
    parser.add_argument("--reverse", action="store_true", help="sort the other way round")
    parser.add_argument("--json", action="store_true", help="print JSON, with all fields and results of each run")
    return parser


def in_order(runs: Sequence[PastRun], key: str, *, backwards: bool = False) -> list[PastRun]:
    """Return the runs sorted by a key; ConfigError if none has it."""
    having = [run for run in runs if run.value(key) is not None]
    if runs and not having:
        known = dict.fromkeys([*OF_EVERY_RUN, *(name for run in runs for name in (*run.results, *run.fields))])
        results = list(dict.fromkeys(name for run in runs for name in run.results))
        near = did_you_mean(key, known) or f"; expected a field of the config or a result: {', '.join(results)}."
        raise ConfigError(f"--sort {key}: no run has it{near}")
    is_result = any(key in run.results for run in having)
    largest_first = (is_result and "loss" not in key) != backwards
    numbers = [run for run in having if isinstance(run.value(key), int | float)]
    texts = [run for run in having if not isinstance(run.value(key), int | float)]
    ordered = [
        *sorted(numbers, key=lambda run: float(run.value(key)), reverse=largest_first),
        *sorted(texts, key=lambda run: text_of(run.value(key)), reverse=largest_first),
    ]
    return [*ordered, *(run for run in runs if run.value(key) is None)]


def as_json(runs: Sequence[PastRun], unread: Sequence[Unread], fields: Sequence[str]) -> str:
    """Return the runs as JSON, in their order."""
    return json_text(
        {
            "runs": [
                {
                    "name": run.name,
                    "path": str(run.path),
                    "status": run.status,
                    "step": run.step,
                    "differs": {field: run.fields.get(field) for field in fields},
                    "results": run.results,
                    "config": run.fields,
                }
                for run in runs
            ],
            "not_read": [{"path": str(each.path), "reason": each.reason} for each in unread],
        },
        indent=2,
    )


def show(
    console: Console,
    options: argparse.Namespace,
    runs: Sequence[PastRun],
    unread: Sequence[Unread],
    fields: Sequence[str],
) -> None:
    """Print a table of the runs, and a line for each folder that is not in it."""
    if not runs:
        console.print(f"no runs in {printable(str(options.dir))}", soft_wrap=True)
    else:
        results = dict.fromkeys(name for run in runs for name in run.results if "." in name)
        wanted = [options.sort] if options.sort and options.sort not in (*OF_EVERY_RUN, *results) else []
        columns = list(dict.fromkeys([*OF_EVERY_RUN, *fields[:MAX_FIELDS], *wanted, *results]))
        table = Table(box=None, pad_edge=False)
        for column in columns:
            is_number = all(isinstance(run.value(column), int | float | None) for run in runs)
            table.add_column(printable(column), justify="right" if is_number else "left", overflow="fold")
        for run in runs:
            table.add_row(*(printable(text_of(run.value(column)))[:MAX_TEXT] for column in columns))
        console.print(table)
        if len(fields) > MAX_FIELDS:
            more = ", ".join(fields[MAX_FIELDS : MAX_FIELDS + 3])
            console.print(f"{len(fields) - MAX_FIELDS} more fields differ ({more} ...): --json", soft_wrap=True)
    for each in unread:
        word = "damaged" if each.is_damaged else "not a run"
        console.print(printable(f"{each.path}: {word}: {each.reason}"), soft_wrap=True)


def text_of(value: Any) -> str:
    """Return a value of a config or a result as a short text."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json_text(value)
