"""`disttrain compare RUN_A RUN_B`: find the first step at which two runs differ, and the part of it that differs.

*Contract*: the runs are not changed. Exit code 0: no difference; 1: a difference; 2: the runs cannot be compared.

*Errors*: ConfigError for a folder without a run or a ledger, and for ledgers without a common step.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from disttrain.commands.exit_codes import DIFFERENT, SAME, USAGE
from disttrain.config import differences_that_matter, read_stored
from disttrain.errors import ConfigError
from disttrain.evidence import (
    Comparison,
    first_difference,
    read_ledger,
    with_evaluations,
    with_values,
    without_rounding,
)
from disttrain.evidence.ledger import Line
from disttrain.files import printable
from disttrain.run.directory import RunDirectory
from disttrain.run.launch_changes import launch_changes
from disttrain.run.launches import launch_before, read_launches
from disttrain.run.result import read_result


def compare_runs(left: RunDirectory, right: RunDirectory, *, same_ranks: bool = False) -> Comparison:
    """Compare the configs, ledgers, evaluations and results of two runs, which may have been killed.

    Without `same_ranks`, a metric (not the loss) may differ by rounding: sums of floats depend on the number of ranks.
    """
    ledgers = [_with_curves(run) for run in (left, right)]
    rounding: list[str] = []
    if not same_ranks:
        ledgers[1], rounding = without_rounding(ledgers[0], ledgers[1], _metrics_of(left))
    common_steps = ledgers[0].keys() & ledgers[1].keys()
    if not common_steps - {0}:
        raise ConfigError(
            f"the ledgers of {left.path} and {right.path} have no step in common; let both runs do the same steps"
        )
    results = [read_result(run.result_json) or {} for run in (left, right)]
    best = [_best_of(result) for result in results]
    return Comparison(
        num_steps=len(common_steps - {0}),
        last_steps=(max(ledgers[0]), max(ledgers[1])),
        num_hashed=sum("state" in ledgers[0][step] and "state" in ledgers[1][step] for step in common_steps),
        configs=tuple(_config_differences(left, right)),
        difference=first_difference(*ledgers),
        weights=(results[0].get("params_sha256"), results[1].get("params_sha256")),
        best=(best[0], best[1]),
        num_evaluations=(_num_evaluations(ledgers[0]), _num_evaluations(ledgers[1])),
        rounding=tuple(rounding),
    )


def _with_curves(run: RunDirectory) -> dict[int, Line]:
    """Return the ledger's lines, with what the curves of training and evaluations hold beside them."""
    lines = with_values(read_ledger(run.ledger_jsonl), run.metrics / "train.jsonl")
    return with_evaluations(lines, run.metrics / "valid.jsonl")


def _metrics_of(run: RunDirectory) -> set[str]:
    """Return the names of a run's metrics of the validation data; none if its config cannot be read."""
    try:
        fields = read_stored(run.config_json).fields
    except OSError:
        return set()  # `_config_differences` reports it
    return {key.split(".")[1] for key in fields if key.startswith("metrics.")}


def _num_evaluations(ledger: Mapping[int, Line]) -> int:
    return sum("evaluation" in line for line in ledger.values())


def _best_of(result: Mapping[str, Any]) -> str | None:
    """Return the step and the value of a run's best evaluation; None if it has none."""
    best = result.get("best")
    return f"step {best.get('step')} ({best.get('monitor')} {best.get('value')})" if isinstance(best, dict) else None


def _config_differences(left: RunDirectory, right: RunDirectory) -> list[str]:
    configs = []
    for run in (left, right):
        try:
            configs.append(read_stored(run.config_json).fields)
        except OSError as error:
            raise ConfigError(
                f"expected a run directory, got {run.path}, whose config.json cannot be read ({error.strerror}); "
                "give one such as runs/NAME"
            ) from None
    return [f"{found.field}: {found.old} and {found.new}" for found in differences_that_matter(*configs)]


def compare_command(first: Path, second: Path) -> int:
    """Print the first difference of two runs; return the exit code."""
    console = Console(highlight=False, markup=False, emoji=False)
    try:
        comparison = compare_runs(RunDirectory(first), RunDirectory(second))
    except ConfigError as error:
        print(f"ConfigError: {printable(str(error))}", file=sys.stderr)
        return USAGE
    for text in comparison.configs:
        console.print(f"the configs differ in {printable(text)}", soft_wrap=True)
    num_steps = comparison.last_steps
    if num_steps[0] != num_steps[1]:
        console.print(
            f"{first} has {num_steps[0]} steps, {second} has {num_steps[1]}; the common steps are compared",
            soft_wrap=True,
        )
    print_code_differences((first, second), comparison, console)
    if not comparison.same:
        print_difference(comparison, console)
    else:
        console.print(
            f"the same bits: {comparison.num_steps} steps, the whole state at {comparison.num_hashed} of them",
            soft_wrap=True,
        )
    for text in comparison.rounding:
        console.print(printable(f"{text} (rounding: docs/guarantees.md)"), soft_wrap=True)
    return SAME if comparison.same else DIFFERENT


def print_code_differences(paths: tuple[Path, Path], comparison: Comparison, console: Console) -> None:
    """Print what differs in the code and the versions of the launches that did the first step that differs."""
    runs = [RunDirectory(path) for path in paths]
    kept = [read_launches(run.launches, run.cfg_py) for run in runs]
    found = comparison.difference
    step = max(comparison.last_steps) if found is None else max(1, found.step)
    left, right = (launch_before(launches, step) for launches in kept)
    if left is None or right is None:
        return  # one of the runs was made of a Config that no file declares
    names = (f"in {paths[0]}", f"in {paths[1]}")
    changes = launch_changes(left.record, right.record, (left.content, right.content), names)
    if changes.may_change_bits:
        console.print(printable(f"the runs differ in {'; '.join(changes.facts)}"), soft_wrap=True)
        for line in changes.shown(f"diff -r {left.folder} {right.folder}"):
            console.print(line, soft_wrap=True)


def print_difference(comparison: Comparison, console: Console, *, with_cause: bool = True) -> None:
    """Print the first difference of two runs, and its likely cause unless that is known from elsewhere."""
    difference = comparison.difference
    if difference is not None:
        console.print(printable(difference.headline), soft_wrap=True)
        if text := difference.explanation if with_cause else difference.what_was_the_same:
            console.print(text, soft_wrap=True)
        return
    what, ends = "the weights at the end", comparison.weights
    if ends[0] == ends[1]:
        what, ends = "the best evaluations", comparison.best
    console.print(
        f"all {comparison.num_steps} steps are the same in the ledgers, but {what} are {printable(str(ends[0]))} and "
        f"{printable(str(ends[1]))}: "
        "something changed them after the last step",
        soft_wrap=True,
    )
