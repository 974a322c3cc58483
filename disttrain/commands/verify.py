"""`disttrain verify cfg.py`: check that a config gives the same bits after kills, on other ranks, with other workers.

The config is run several times: as a reference, once more in the same way, on each number of ranks, and killed by
SIGKILL and resumed. The ledgers, with hashes at every step, and the weights at the end are compared with the
reference's.

*Contract*: nothing is written to `runs/`. Exit code 0: the same bits in all runs; 1: a difference, with the first one
and its likely cause; 2: the config cannot be run in this way.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from disttrain.commands import launch
from disttrain.commands.compare import compare_runs, print_difference
from disttrain.commands.exit_codes import DIFFERENT, SAME, USAGE
from disttrain.commands.lost_state import lost_values, read_handler_state, record_handler_state
from disttrain.commands.scenarios import Death, Scenario, counted, plan
from disttrain.commands.start_ranks import PRELOAD
from disttrain.config import Config, check_slots, load_config
from disttrain.errors import ConfigError, DisttrainError
from disttrain.evidence import Comparison
from disttrain.evidence.ledger import shortened
from disttrain.launching.local_ranks import LocalRanks
from disttrain.run.directory import RunDirectory

PRELOAD_FSDP = ("torch.distributed.tensor", "torch.distributed.fsdp")
NUM_QUOTED_LINES = 20


class CannotRun(DisttrainError):
    """A run of the verification that ended in another way than by its planned death or with exit code 0."""


class Verdict(NamedTuple):
    """A run beside the reference: its scenario, its comparison, and whether all of it is the same."""

    scenario: Scenario
    comparison: Comparison
    is_same: bool
    handler_state: dict[str, str]
    """The hashes of what handlers hold and no checkpoint does, at the run's end."""

    @property
    def is_killed(self) -> bool:
        return len(self.scenario.lives) > 1


def run_rank(words: Sequence[str], killed_at: int | None) -> int:
    """Run `launch` on one rank of a verification; the rank dies in step `killed_at`, if it is the doomed one."""
    deaths = () if killed_at is None else (Death(killed_at),)
    return launch.main(words, handlers=(*deaths, record_handler_state))


class Verification:
    """Runs the scenarios of one config, each in a folder of its own inside `folder`."""

    def __init__(
        self,
        cfg: Path,
        config: Config,
        overrides: Sequence[str],
        folder: Path,
        *,
        num_slots: int,
        num_steps: int,
        preload: Sequence[str] = (*PRELOAD, "torchmetrics"),
    ) -> None:
        self.folder = folder
        self.num_steps = num_steps
        self._preload = (*preload, *PRELOAD_FSDP) if config.strategy == "fsdp" else preload
        self._name = str(config.name)
        self._words = [
            str(cfg),
            f"checkpoint.every_steps={max(1, num_steps // 10)}",
            "log.tensorboard=false",
            *overrides,
            f"num_slots={num_slots}",
            "max_epochs=none",
            f"max_steps={num_steps}",
            "log.every_steps=1",  # a killed run has written the lines of all its steps
            "ledger.every_steps=1",
        ]

    def run(self, scenario: Scenario) -> RunDirectory:
        """Run a scenario to its end and return its run directory; CannotRun if that fails."""
        folder = self.folder / scenario.name.replace(",", "").replace(" ", "-")
        for number, life in enumerate(scenario.lives, start=1):
            logs = folder / f"life-{number}"
            logs.mkdir(parents=True)
            words = [*self._words, f"num_workers={life.num_workers}", *life.overrides, "--runs", str(folder)]
            with LocalRanks(life.num_ranks, run_rank, (words, life.killed_at), logs, self._preload) as ranks:
                codes = ranks.wait()
            if ranks.first_failed != (-signal.SIGKILL if life.killed_at else None):
                raise CannotRun(
                    f"{scenario.name}, on {counted(life.num_ranks, 'rank')} with "
                    f"{counted(life.num_workers, 'worker')}: the ranks ended with "
                    f"{', '.join(map(str, codes))}, expected "
                    + (f"the death of one in step {life.killed_at}" if life.killed_at else "0")
                    + f". Their output:\n{quoted_output(ranks.logs)}"
                )
        return RunDirectory(folder / self._name)


def quoted_output(logs: Sequence[Path]) -> str:
    """Return the last lines that one rank printed: the first rank with an error, or rank 0."""
    texts = [log.read_text(encoding="utf-8", errors="replace").strip() for log in logs if log.exists()]
    with_error = [text for text in texts if "Error" in text] or texts or [""]
    return "\n".join(f"  {line}" for line in with_error[0].splitlines()[-NUM_QUOTED_LINES:])


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
    try:
        code = run_scenarios(verification, scenarios, console, first_only=options.first)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
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
    failed: CannotRun | None = None
    for number, scenario in enumerate(scenarios, start=1):
        began = time.monotonic()
        with console.status(f"{number}/{len(scenarios)}: {scenario.name}"):
            try:
                run = verification.run(scenario)
            except CannotRun as error:
                failed = error
                break
        reference = reference or run
        comparison = compare_runs(reference, run)
        # Steps that were not compared do not count as the same: both runs have all steps, and the initial state.
        is_whole = comparison.num_steps == verification.num_steps == comparison.num_hashed - 1
        verdict = Verdict(scenario, comparison, comparison.same and is_whole, read_handler_state(run))
        verdicts.append(verdict)
        same = "-" if run is reference else "yes" if verdict.is_same else "NO"
        time_text = f"{time.monotonic() - began:.1f} s"
        table.add_row(*scenario_cells(scenario), time_text, str(comparison.weights[1])[:12], same)
        if not console.is_terminal:
            console.print(
                f"{number}/{len(scenarios)} {scenario.name}: {'done' if same == '-' else 'same bits: ' + same}"
            )
        if first_only and not verdict.is_same:
            break
    console.print(table)
    if failed is not None:
        print(f"\n{failed}", file=sys.stderr)
        return USAGE if reference is None else DIFFERENT
    return print_verdicts(verdicts, console)


def scenario_cells(scenario: Scenario) -> tuple[str, str, str, str]:
    """Return the table's cells of a scenario: its name, numbers of ranks, numbers of workers, and killed steps."""

    def by_life(values: Sequence[int]) -> str:
        return str(values[0]) if len(set(values)) == 1 else ", ".join(map(str, values))

    ranks, workers = ([life.num_ranks for life in scenario.lives], [life.num_workers for life in scenario.lives])
    kills = ", ".join(str(life.killed_at) for life in scenario.lives if life.killed_at)
    return scenario.name, by_life(ranks), by_life(workers), kills or "-"


def print_verdicts(verdicts: Sequence[Verdict], console: Console) -> int:
    """Print the outcome in words, with the first difference; return the exit code. The first verdict: the reference."""
    console.print()
    wrong = [verdict for verdict in verdicts if not verdict.is_same]
    for verdict in wrong[:1]:
        console.print(f"not the same bits: {verdict.scenario.name}", style="bold red")
        print_difference(verdict.comparison, console)
    if wrong:
        others = [verdict.scenario.name for verdict in wrong[1:]]
        if others:
            console.print(f"also not the same bits: {', '.join(others)}", soft_wrap=True)
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
    num_steps = verdicts[-1].comparison.num_steps
    console.print(
        f"the same bits in all {len(verdicts)} runs: at each of {num_steps} steps the samples, what was loaded of "
        "them, every slot's loss, the gradient's norm, all weights, buffers and optimizer states",
        soft_wrap=True,
    )
    for text in dict.fromkeys(text for verdict in verdicts for text in verdict.comparison.other):
        console.print(f"but {text} (float metrics may differ in their last digits: docs/guarantees.md)", soft_wrap=True)
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
