"""`disttrain verify cfg.py`: does this config give the same bits after kills, on other ranks, with other workers?

The config is really run: as a reference, once more alike, on each number of ranks, and killed by SIGKILL and resumed.
The runs' ledgers, with hashes at every step, and the weights at their ends are compared with the reference's.

*Contract*: `runs/` is left alone. Exit code 0: all the same bits; 1: not, with the first difference and what it means;
2: the config cannot be run so.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from disttrain import launch
from disttrain.backend.local import LocalRanks
from disttrain.config import Config, check_slots, load_config
from disttrain.errors import ConfigError, DisttrainError
from disttrain.observe import Comparison, compare_runs
from disttrain.run_directory import RunDirectory
from disttrain.scenarios import Death, Scenario, counted, plan

SAME, DIFFERENT, USAGE = 0, 1, 2
PRELOAD = ("disttrain.launch", "torch.nn.parallel", "torch._dynamo.config", "torchmetrics")
"""What every rank imports sooner or later, DDP's constructor the third of these, which takes seconds."""
PRELOAD_FSDP = ("torch.distributed.tensor", "torch.distributed.fsdp")
NUM_QUOTED_LINES = 20


class CannotRun(DisttrainError):
    """A run of the verification that ended otherwise than by the death that was meant for it."""


def rank_main(words: Sequence[str], killed_at: int | None) -> int:
    """What each rank of a verification runs: the launcher itself."""
    return launch.main(words, handlers=() if killed_at is None else (Death(killed_at),))


class Verification:
    """Runs scenarios of one config in a folder of their own."""

    def __init__(
        self,
        cfg: Path,
        config: Config,
        overrides: Sequence[str],
        folder: Path,
        *,
        num_slots: int,
        num_steps: int,
        preload: Sequence[str] = PRELOAD,
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
            "log.every_steps=1",  # so that a killed run has written all that it did
            "ledger.every_steps=1",
        ]

    def run(self, scenario: Scenario) -> RunDirectory:
        """Run a scenario to its end; CannotRun where it cannot be."""
        place = self.folder / scenario.name.replace(",", "").replace(" ", "-")
        for number, life in enumerate(scenario.lives, start=1):
            logs = place / f"life-{number}"
            logs.mkdir(parents=True)
            words = [*self._words, f"num_workers={life.num_workers}", *life.overrides, "--runs", str(place)]
            with LocalRanks(life.num_ranks, rank_main, (words, life.killed_at), logs, self._preload) as ranks:
                codes = ranks.wait()
            if ranks.first_failed != (-signal.SIGKILL if life.killed_at else None):
                raise CannotRun(
                    f"{scenario.name}, on {counted(life.num_ranks, 'rank')} with "
                    f"{counted(life.num_workers, 'worker')}: the ranks ended with "
                    f"{', '.join(map(str, codes))}, expected "
                    + (f"the death of one in step {life.killed_at}" if life.killed_at else "0")
                    + f". They said:\n{quoted(ranks.logs)}"
                )
        return RunDirectory(place / self._name)


def quoted(logs: Sequence[Path]) -> str:
    """Return the last lines of what the ranks printed, those of a rank alone that said the most."""
    texts = [log.read_text(encoding="utf-8", errors="replace").strip() for log in logs if log.exists()]
    said = [text for text in texts if "Error" in text] or texts or [""]
    return "\n".join(f"  {line}" for line in said[0].splitlines()[-NUM_QUOTED_LINES:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line says; return the exit code."""
    options = parser().parse_intermixed_args(arguments)
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 120)
    try:
        if Path(options.config).is_dir():
            raise ConfigError(f"{options.config}: expected a cfg.py, got a folder; a run directory is left alone")
        config = load_config(Path(options.config), options.overrides)
        if options.kills > options.steps:
            raise ConfigError(f"--kills {options.kills}: expected at most one a step, of {options.steps}")
        most = max(options.worlds)
        num_slots = check_slots(config.global_batch_size, config.num_slots or most, most)
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
        code = verify(verification, scenarios, console, first_only=options.first)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        if options.keep is None and code == SAME:
            shutil.rmtree(folder)
        else:
            console.print(f"the runs are kept in {folder}", soft_wrap=True)
    return code


def verify(
    verification: Verification, scenarios: Sequence[Scenario], console: Console, *, first_only: bool = False
) -> int:
    """Make the runs, print a table of them and what the first difference means; return the exit code."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("run", "ranks", "workers", "killed at", "time", "weights", "same bits"):
        table.add_column(heading, no_wrap=heading != "killed at", overflow="fold")
    reference: RunDirectory | None = None
    found: list[tuple[Scenario, Comparison, bool]] = []
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
        # Every step and the beginning were compared: what was not seen is not the same.
        whole = comparison.num_steps == verification.num_steps == comparison.num_hashed - 1
        alike = comparison.same and whole
        if run is not reference:
            found.append((scenario, comparison, alike))
        same = "-" if run is reference else "yes" if alike else "NO"
        table.add_row(*row(scenario), f"{time.monotonic() - began:.1f} s", str(comparison.weights[1])[:12], same)
        if not console.is_terminal:
            console.print(
                f"{number}/{len(scenarios)} {scenario.name}: {'done' if same == '-' else 'same bits: ' + same}"
            )
        if first_only and not alike:
            break
    console.print(table)
    if failed is not None:
        print(f"\n{failed}", file=sys.stderr)
        return USAGE if reference is None else DIFFERENT
    return conclude(found, console)


def row(scenario: Scenario) -> tuple[str, str, str, str]:
    """Return a scenario as the first cells of the table."""

    def each(values: Sequence[Any]) -> str:
        return str(values[0]) if len(set(values)) == 1 else ", ".join(map(str, values))

    lives = scenario.lives
    kills = ", ".join(str(life.killed_at) for life in lives if life.killed_at)
    return scenario.name, each([x.num_ranks for x in lives]), each([x.num_workers for x in lives]), kills or "-"


def conclude(found: Sequence[tuple[Scenario, Comparison, bool]], console: Console) -> int:
    """Say in words what the table shows; return the exit code."""
    console.print()
    wrong = [(scenario, comparison) for scenario, comparison, alike in found if not alike]
    for scenario, comparison in wrong[:1]:
        console.print(f"not the same bits: {scenario.name}", style="bold red")
        tell(comparison, console)
    if wrong:
        others = [scenario.name for scenario, _ in wrong[1:]]
        if others:
            console.print(f"also not the same bits: {', '.join(others)}", soft_wrap=True)
        return DIFFERENT
    steps = found[-1][1].num_steps
    console.print(
        f"the same bits in all {len(found) + 1} runs: at each of {steps} steps the samples, what was loaded of them, "
        "every slot's loss, the gradient's norm, all weights, buffers and optimizer states",
        soft_wrap=True,
    )
    for text in dict.fromkeys(text for _, comparison, _ in found for text in comparison.other):
        console.print(f"but {text} (float metrics may differ in their last digits: docs/guarantees.md)", soft_wrap=True)
    return SAME


def tell(comparison: Comparison, console: Console) -> None:
    """Print the first difference of two runs and what it means."""
    if comparison.difference is not None:
        console.print(comparison.difference.headline, soft_wrap=True)
        console.print(comparison.difference.explanation, soft_wrap=True)
    else:
        console.print(
            f"all {comparison.num_steps} steps are the same in the ledgers, but the weights at the end are "
            f"{comparison.weights[0]} and {comparison.weights[1]}: something changed them after the last step",
            soft_wrap=True,
        )


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(
        prog="disttrain verify",
        description="Run a config several times, killed and resized, and compare every bit of every step. It is how "
        "you find out whether your own model and data are deterministic, and where they are not.",
        epilog="exit codes: 0: the same bits in all runs; 1: not the same, with the first difference; 2: cannot be run",
    )
    made.add_argument("config", metavar="CFG.PY", help="a file that ends in config = Config(...)")
    made.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="fields to set, such as precision=bf16")
    made.add_argument("--worlds", type=several(1), default=[1, 2], metavar="N,N", help="numbers of ranks (1,2)")
    made.add_argument("--workers", type=several(0), default=[0, 1], metavar="N,N", help="loader processes (0,1)")
    made.add_argument("--kills", type=at_least(0), default=2, metavar="N", help="kills in a run (2)")
    made.add_argument("--steps", type=at_least(1), default=30, metavar="N", help="steps of each run (30)")
    made.add_argument("--first", action="store_true", help="stop at the first run that differs")
    made.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs in a new folder")
    return made


def at_least(low: int) -> Any:
    """Return the reader of a whole number of at least `low`, for argparse."""

    def read(text: str) -> int:
        if not (text.isdecimal() and int(text) >= low):
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} on, got {text!r}")
        return int(text)

    return read


def several(low: int) -> Any:
    """Return the reader of a list of different whole numbers of at least `low`, for argparse."""

    def read(text: str) -> list[int]:
        numbers = [at_least(low)(part.strip()) for part in text.split(",")]
        return list(dict.fromkeys(numbers))

    return read
