"""`disttrain verify cfg.py`: check that a config gives the same bits after kills, on other ranks, with other workers.

The config is run several times: as a reference, once more in the same way, on each number of ranks, and killed by
SIGKILL and resumed. Each start is an interpreter of its own, with other settings (`attacks`). The ledgers, with hashes
at every step, the evaluations and the weights at the end are compared with the reference's.

*Contract*: nothing is written to `runs/`. Exit code 0: the same bits in all runs; 1: a difference, with the first one
and its likely cause; 2: the config cannot be run in this way.
"""

import argparse
import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from disttrain.commands.attacks import attacked
from disttrain.commands.causes import Finding, find_cause, run_where_possible
from disttrain.commands.compare import compare_runs, print_difference
from disttrain.commands.exit_codes import DIFFERENT, SAME, USAGE
from disttrain.commands.lost_state import lost_values, read_handler_state
from disttrain.commands.scenarios import Scenario, counted, plan
from disttrain.commands.verification import CannotRun, Verification
from disttrain.config import check_slots, load_config
from disttrain.errors import ConfigError
from disttrain.evidence import Comparison
from disttrain.evidence.ledger import shortened
from disttrain.run.directory import RunDirectory


class Verdict(NamedTuple):
    """A run beside the reference: its scenario, its comparison, and whether all of it is the same."""

    scenario: Scenario
    comparison: Comparison
    is_same: bool
    handler_state: dict[str, str]
    """The hashes of what handlers hold and no checkpoint does, at the run's end."""
    finding: Finding | None = None

    @property
    def is_killed(self) -> bool:
        return len(self.scenario.lives) > 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = verify_parser().parse_intermixed_args(arguments)
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 120)
    try:
        if Path(options.config).is_dir():
            raise ConfigError(f"{options.config}: expected a cfg.py, got a folder; verify leaves run directories alone")
        config = load_config(Path(options.config), options.overrides)
        if options.kills > options.steps:
            raise ConfigError(
                f"--kills {options.kills}: expected at most one kill for each of the {options.steps} steps"
            )
        most_ranks = max(options.worlds)
        num_slots = check_slots(config.global_batch_size, config.num_slots or most_ranks, most_ranks)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return USAGE
    folder = options.keep or Path(tempfile.mkdtemp(prefix="disttrain-verify-"))
    if options.keep is not None and folder.exists() and any(folder.iterdir()):
        print(f"ConfigError: --keep {folder}: expected a new or empty folder", file=sys.stderr)
        return USAGE
    verification = Verification(
        Path(options.config).resolve(),
        config,
        options.overrides,
        folder.resolve(),
        num_slots=num_slots,
        num_steps=options.steps,
    )
    scenarios = plan(options.worlds, options.workers, options.kills, options.steps)
    console.print(
        f"verifying {config.name}: {options.steps} steps, {num_slots} slots, {len(scenarios)} runs", soft_wrap=True
    )
    code = USAGE
    scratch_directory = tempfile.TemporaryDirectory(prefix="disttrain-", ignore_cleanup_errors=True)
    with scratch_directory as scratch, closing(verification):
        if not options.quick:
            scenarios = attacked(scenarios, Path(scratch).resolve())
        try:
            code = run_scenarios(verification, scenarios, console, first_only=options.first)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
    if options.keep is None and code == SAME:
        shutil.rmtree(folder)
    else:
        console.print(f"the runs are kept in {folder}", soft_wrap=True)
    return code


def run_scenarios(
    verification: Verification, scenarios: Sequence[Scenario], console: Console, *, first_only: bool = False
) -> int:
    """Run the scenarios; print their table, and the first difference with its likely cause. Return the exit code."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("run", "ranks", "workers", "killed at", "time", "weights", "same bits"):
        table.add_column(heading, no_wrap=heading != "killed at", overflow="fold")
    reference: RunDirectory | None = None
    verdicts: list[Verdict] = []
    notes: list[str] = []
    failed: CannotRun | None = None
    for number, (scenario, following) in enumerate(zip(scenarios, [*scenarios[1:], None], strict=True), start=1):
        began = time.monotonic()
        with console.status(f"{number}/{len(scenarios)}: {scenario.name}"):
            try:
                run = run_where_possible(verification, scenario, following, notes)
            except CannotRun as error:
                failed = error
                break
        reference = reference or run
        ranks = {life.num_ranks for life in (*scenarios[0].lives, *scenario.lives)}
        compare = functools.partial(compare_runs, reference, same_ranks=len(ranks) == 1)
        verdict = judged(scenario, run, compare(run), verification.num_steps)
        is_unexplained = any(earlier.finding and earlier.finding.setting is None for earlier in verdicts)
        if not (verdict.comparison.same or is_unexplained):
            with console.status(f"{scenario.name} differs: looking for the setting that matters"):
                finding = find_cause(verification, scenario, verdict.comparison, compare)
                verdict = verdict._replace(finding=finding)
        verdicts.append(verdict)
        same = "-" if run is reference else "yes" if verdict.is_same else "NO"
        time_text = f"{time.monotonic() - began:.1f} s"
        table.add_row(*scenario_cells(scenario), time_text, str(verdict.comparison.weights[1])[:12], same)
        if not console.is_terminal:
            console.print(
                f"{number}/{len(scenarios)} {scenario.name}: {'done' if same == '-' else 'same bits: ' + same}"
            )
        if first_only and not verdict.is_same:
            break
    console.print(table)
    if failed is not None:
        print_differences(verdicts, console)
        print(f"\n{failed}", file=sys.stderr)
        return USAGE if reference is None else DIFFERENT
    return print_verdicts(verdicts, console, notes)


def scenario_cells(scenario: Scenario) -> tuple[str, str, str, str]:
    """Return the table's cells of a scenario: its name, numbers of ranks, numbers of workers, and killed steps."""

    def by_life(values: Sequence[int]) -> str:
        return str(values[0]) if len(set(values)) == 1 else ", ".join(map(str, values))

    ranks, workers = ([life.num_ranks for life in scenario.lives], [life.num_workers for life in scenario.lives])
    kills = ", ".join(str(life.killed_at) for life in scenario.lives if life.killed_at)
    return scenario.name, by_life(ranks), by_life(workers), kills or "-"


def judged(scenario: Scenario, run: RunDirectory, comparison: Comparison, num_steps: int) -> Verdict:
    """Return the verdict on a run. What was not compared does not count as the same.

    Both runs have all steps, the initial state, and the same number of evaluations.
    """
    is_whole = comparison.num_steps == num_steps == comparison.num_hashed - 1
    is_whole &= len(set(comparison.num_evaluations)) == 1
    return Verdict(scenario, comparison, comparison.same and is_whole, read_handler_state(run))


def print_differences(verdicts: Sequence[Verdict], console: Console) -> bool:
    """Print the first difference with its likely cause, and others with a known cause; return whether there is one."""
    wrong = [verdict for verdict in verdicts if not verdict.is_same]
    shown = [verdict for verdict in wrong if verdict is wrong[0] or verdict.finding]
    for verdict in shown:
        console.print(f"not the same bits: {verdict.scenario.name}", style="bold red")
        finding = verdict.finding
        print_difference(verdict.comparison, console, with_cause=finding is None or finding.setting is None)
        if finding is not None:
            console.print(finding.text, soft_wrap=True)
    others = [verdict.scenario.name for verdict in wrong if verdict not in shown]
    if others:
        console.print(f"also not the same bits: {', '.join(others)}", soft_wrap=True)
    return bool(wrong)


def print_verdicts(verdicts: Sequence[Verdict], console: Console, notes: Sequence[str]) -> int:
    """Print the outcome in words, with the first difference; return the exit code. The first verdict: the reference."""
    console.print()
    is_different = print_differences(verdicts, console)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    if is_different:
        return DIFFERENT
    lost = lost_values(
        [verdict.handler_state for verdict in verdicts if not verdict.is_killed],
        [verdict.handler_state for verdict in verdicts if verdict.is_killed],
    )
    if lost:
        console.print(f"a kill loses the state of a handler: {shortened(lost, 4)}", style="bold red", soft_wrap=True)
        console.print(
            "The weights are the same, but no checkpoint holds this state, so a resumed run begins with a new one. "
            "Save the object by run.keep(NAME, OBJECT) in the handler (docs/handlers.md).",
            soft_wrap=True,
        )
        return DIFFERENT
    comparison = verdicts[-1].comparison
    num_evaluations = comparison.num_evaluations[1]
    console.print(
        f"the same bits in all {len(verdicts)} runs: at each of {comparison.num_steps} steps the samples, what was "
        "loaded of them, every slot's loss and what the curve holds beside it, the gradient's norm, all weights, "
        "buffers and optimizer states"
        + (f"; and the results of {counted(num_evaluations, 'evaluation')}" if num_evaluations else ""),
        soft_wrap=True,
    )
    for text in dict.fromkeys(text for verdict in verdicts for text in verdict.comparison.rounding):
        console.print(f"but {text} (float metrics may differ in their last digits: docs/guarantees.md)", soft_wrap=True)
    if all(life.surroundings is None for verdict in verdicts for life in verdict.scenario.lives):
        console.print(
            "--quick: all runs began in one process, so this does not show what depends on the hash seed, the threads, "
            "the working directory, the time zone and other settings of a process",
            soft_wrap=True,
        )
    return SAME


def verify_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="disttrain verify",
        description="Run a config several times, killed and resized, and compare every bit of every step. This shows "
        "whether your own model and data are deterministic, and where they are not.",
        epilog="exit codes: 0: the same bits in all runs; 1: a difference, which is printed; 2: the config, or the "
        "command, cannot be run",
    )
    add = parser.add_argument
    add("config", metavar="CFG.PY", help="a file that ends in config = Config(...)")
    add("overrides", metavar="KEY=VALUE", nargs="*", help="new values of config fields, such as precision=bf16")
    add("--worlds", type=list_from(1), default=[1, 2], metavar="N,N", help="numbers of ranks (default: 1,2)")
    add("--workers", type=list_from(0), default=[0, 1], metavar="N,N", help="loader processes a rank (default: 0,1)")
    add("--kills", type=number_from(0), default=2, metavar="N", help="number of kills in a run (default: 2)")
    add("--steps", type=number_from(1), default=30, metavar="N", help="number of steps of a run (default: 30)")
    add("--quick", action="store_true", help="fork all runs off one process; without, each start has other settings")
    add("--first", action="store_true", help="stop at the first run that differs")
    add("--keep", type=Path, metavar="DIR", help="keep all runs, in this new folder")
    return parser


def number_from(low: int) -> Callable[[str], int]:
    """Return a reader of a whole number of at least `low`, for argparse."""

    def read(text: str) -> int:
        if not (text.isdecimal() and int(text) >= low):
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} on, got {text!r}")
        return int(text)

    return read


def list_from(low: int) -> Callable[[str], list[int]]:
    """Return a reader of a list of whole numbers of at least `low`, without repetitions, for argparse."""

    def read(text: str) -> list[int]:
        numbers = [number_from(low)(part.strip()) for part in text.split(",")]
        return list(dict.fromkeys(numbers))

    return read
