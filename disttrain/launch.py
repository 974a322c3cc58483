"""The launcher: `torchrun ... -m disttrain.launch cfg.py [key=value ...]`, or `python -m` for one process.

*Contract*: a mistake gives one message, printed by the rank that failed first, and every rank ends with the
exit code that `EXIT_CODES` lists. An existing run is untouched until all that can be checked has been.
"""

import argparse
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from disttrain import recipe
from disttrain.backend import Backend, connect
from disttrain.backend.determinism import CUBLAS_WORKSPACES
from disttrain.backend.environment import LONGEST_GRACE_S, grace_s, launch_marks, set_default
from disttrain.backend.parent import end_with_launcher
from disttrain.backend.torchrun import leave
from disttrain.config import (
    Config,
    Description,
    blocking_differences,
    check_slots,
    config_hash,
    describe,
    differences,
    field_table,
    from_json,
    load_config,
    replace,
    with_num_slots,
)
from disttrain.errors import ConfigError, DisttrainError, Interrupted, RemoteError
from disttrain.handlers.preemption import Preemption
from disttrain.ranks import add_options, on_ranks
from disttrain.run_directory import RunDirectory
from disttrain.summary import greet, summarise
from disttrain.version import __version__

COMPLETED, FAILED, USAGE, INTERRUPTED = 0, 1, 2, Interrupted.exit_code
SLACK, LEAST_SLACK_S = 0.25, 5.0
"""Collectives wait so much longer than a rank may be silent: a hang is told by the watchdog, which knows who hangs."""
WATCHDOG_ENDS_WITHIN_S = 10.0
EXIT_CODES = {
    COMPLETED: "completed, now or before",
    FAILED: "failed while running; the last checkpoint is kept",
    USAGE: "the command, the config or the data cannot be run",
    INTERRUPTED: "interrupted by a signal, after a checkpoint if a step was done; the same command goes on",
}


def main(arguments: Sequence[str] | None = None, *, handlers: Sequence[Callable[[Any, Any], object]] = ()) -> int:
    """Run what the command line says; return the exit code. `handlers` come after the config's own."""
    options = parser().parse_intermixed_args(arguments)
    logging.getLogger("disttrain").addHandler(logging.NullHandler())  # what is logged goes to the ranks' files alone
    try:
        if options.grace is not None and not 1 <= options.grace <= LONGEST_GRACE_S:
            raise ConfigError(f"expected --grace to be from 1 to {LONGEST_GRACE_S} seconds, got {options.grace}")
        if options.ranks is not None and not (options.check or options.print_config):
            return on_ranks(options)
        with Preemption(starting=True) as preemption:
            return leave(train(options, handlers, preemption))
    except (ConfigError, KeyboardInterrupt) as error:  # before the ranks were there, or connected
        return leave(tell(error, options))


def train(options: argparse.Namespace, handlers: Sequence[Callable[[Any, Any], object]], preemption: Preemption) -> int:
    """Load the config, connect the ranks and do what the options ask for."""
    config: Config | None = None
    mistake: ConfigError | None = None
    try:
        config = load_config(Path(options.config), options.overrides)
        if handlers:
            config = replace(config, handlers=(*config.handlers, *handlers))
        preemption.grace_s = grace_s() if options.grace is None else float(options.grace)
    except ConfigError as error:
        mistake = error
    if config is not None and options.print_config:
        print(json.dumps(describe(config), indent=2))
        return COMPLETED
    if config is not None and options.check:
        return check(config)
    try:
        end_with_launcher()
        set_default("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])  # before connecting starts CUDA
        silent_s = config.timeout_s if config else 60.0
        waits_s = silent_s + max(LEAST_SLACK_S, SLACK * silent_s)
        backend = connect(config.backend if config else "auto", timeout_s=waits_s, spmd=asks_spmd(config))
    except DisttrainError as error:
        return tell(mistake or error, options)
    with backend:
        preemption.backend = backend
        try:
            with backend.agree("loading the config"):
                if mistake is not None:
                    raise mistake
            assert config is not None
            return start(config, options, backend, preemption)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last place that can tell a person
            return report(error, backend, options)


def asks_spmd(config: Config | None) -> bool | None:
    """Return whether one rank is to drive all XLA devices; None: where there are XLA devices."""
    if config is None or config.spmd or config.strategy != "fsdp":
        return config is not None and config.spmd
    return None


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser; --help lists every field of a Config."""
    made = argparse.ArgumentParser(
        prog="python -m disttrain.launch",
        description="Train what a cfg.py declares: in one process, or on every rank that torchrun or srun starts. "
        "Run it again and it goes on from its newest checkpoint.",
        epilog="exit codes: " + "; ".join(f"{code}: {meaning}" for code, meaning in EXIT_CODES.items()),
        add_help=False,
    )
    made.add_argument("config", metavar="CFG.PY", help="a file that ends in config = Config(...), or a run directory")
    made.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="fields to set, such as optimizer.lr=3e-4")
    made.add_argument("--runs", metavar="DIR", type=Path, default=Path("runs"), help="where run directories are (runs)")
    made.add_argument("--fresh", action="store_true", help="start anew; the old run is kept under another name")
    made.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    made.add_argument("--check", action="store_true", help="check the config without starting ranks, and stop")
    made.add_argument("--traceback", action="store_true", help="print where in the code a mistake was found")
    add_options(made)
    made.add_argument("--version", action="version", version=f"disttrain {__version__}")
    made.add_argument("-h", "--help", action=_Help, nargs=0, help="show this, with every field of a Config, and stop")
    return made


class _Help(argparse.Action):
    """Prints the usual help and then the table of fields, made from the Config itself."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        parser.print_help()
        table = Table(title="fields of a Config", title_justify="left", box=None, pad_edge=False)
        for heading in ("field", "type", "unit", "default", "meaning"):
            table.add_column(heading, overflow="fold", no_wrap=heading == "field")
        for row in field_table():
            table.add_row(row.name, row.type, row.unit, row.default, row.meaning)
        console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
        console.print()
        console.print(table)
        parser.exit()


def check(config: Config) -> int:
    """Say that the config holds, as far as that can be seen without ranks and data."""
    slots = "as many slots as ranks" if config.num_slots is None else f"{config.num_slots} slots"
    print(f"{config.name}: the config is in order; {slots}, config hash {config_hash(config)[:12]}")
    return COMPLETED


def start(config: Config, options: argparse.Namespace, backend: Backend, preemption: Preemption) -> int:
    """Hold the config against the other ranks and the run that may be there, then run it."""
    console = Console(quiet=backend.rank != 0, highlight=False, markup=False, emoji=False)
    path = Path(options.config)
    directory = RunDirectory(path if path.is_dir() else options.runs / str(config.name))
    fresh = options.fresh and not began_it(directory, backend)
    with backend.agree("reading the run directory"):
        if options.fresh and path.is_dir():
            raise ConfigError(f"--fresh wants a cfg.py, got the run directory {path}; use {path / 'cfg.py'}")
        there = begun(directory) if backend.rank == 0 and not fresh else None
    stored, ended = backend.broadcast((there, directory.result()) if backend.rank == 0 else None)
    with backend.agree("checking the config"):
        config = settle_slots(config, stored, backend.world_size)
    compare(config, stored, directory, backend)
    if stored is not None and ended is not None and finished(ended, config):
        console.print(f"{directory.path} is completed; --fresh starts it anew")
        summarise(ended, directory, console)
        return COMPLETED
    greet(config, directory, backend, console)
    try:
        result = recipe.run(config, backend, directory, console, preemption, fresh=fresh)
    except BaseException as error:
        if backend.rank == 0 and preemption.starting and interrupted(error, backend):
            directory.interrupt(fresh=fresh)
        raise
    summarise(result, directory, console)
    return COMPLETED if result["status"] == "completed" else INTERRUPTED


def began_it(directory: RunDirectory, backend: Backend) -> bool:
    """Return whether this launch, in an earlier life of its ranks, began the run that is there; note who it is."""
    marks = {mark: shows for by_rank in backend.all_gather(launch_marks()) for mark, shows in by_rank.items()}
    directory.launch_marks = sorted(marks)
    bears = backend.rank == 0 and any(shows and directory.bears(mark) for mark, shows in marks.items())
    return bool(backend.broadcast(bears))


def begun(directory: RunDirectory) -> Description | None:
    """Return the config of the run that is there, or None where none has saved anything."""
    if not directory.has_begun():
        return None
    try:
        return from_json(directory.config_json.read_text(encoding="utf-8"), str(directory.config_json)).fields
    except OSError as error:
        raise ConfigError(
            f"{directory.config_json} cannot be read: {error.strerror}; restore it, or use --fresh"
        ) from None


def compare(config: Config, stored: Description | None, directory: RunDirectory, backend: Backend) -> None:
    """Hold the config against the other ranks' and the run's; ConfigError, on every rank, where they differ."""
    mine = describe(config)
    by_rank = backend.all_gather(mine)
    for rank, theirs in enumerate(by_rank):
        if differing := differences(by_rank[0], theirs):
            said = "; ".join(f"{d.field}: rank 0 has {d.old!r}, rank {rank} has {d.new!r}" for d in differing)
            raise ConfigError(f"the ranks have different configs: {said}; start all with the same cfg.py and overrides")
    # A directory may be moved, so the name under which a run began does not bind it.
    if stored is not None and (differing := blocking_differences({**stored, "name": mine["name"]}, mine)):
        raise ConfigError(
            f"{directory.path} holds a run of another config: {'; '.join(map(str, differing))}. "
            "Go back to its values, give this run another name=NAME, or start anew with --fresh"
        )


def settle_slots(config: Config, stored: Description | None, world_size: int) -> Config:
    """Return the config with its number of slots: its own, that of the run that is there, or the world size."""
    kept = None if stored is None else stored.get("num_slots")
    num_slots = config.num_slots or (kept if isinstance(kept, int) else None)
    return with_num_slots(config, check_slots(config.global_batch_size, num_slots, world_size))


def finished(result: dict[str, Any], config: Config) -> bool:
    """Return whether a run that ended so has nothing left to do under this config."""
    if result["status"] != "completed":
        return False
    if config.max_steps is not None:
        return int(result["step"]) >= config.max_steps
    return int(result["epoch"]) >= (config.max_epochs or 0)


def report(error: BaseException, backend: Backend, options: argparse.Namespace) -> int:
    """Tell a person what went wrong, on the rank where it did; return this rank's exit code."""
    if isinstance(error, RemoteError):
        return code_of(error)
    if isinstance(error, RuntimeError) and not isinstance(error, DisttrainError):
        # A collective that broke is not the cause but the news of it: who failed has said why.
        heard = backend.first_failure(wait_s=0.5)
        if heard is not None and heard.rank == backend.rank:
            # Another thread of this process has reported that: the watchdog, which says why and ends the process.
            time.sleep(WATCHDOG_ENDS_WITHIN_S)
            return FAILED
    else:
        heard = None
    if heard is None:
        backend.fail(error)
        heard = backend.first_failure(wait_s=0.0)
    if heard is not None and heard.rank != backend.rank:
        return code_of(heard)
    return tell(error, options)


def code_of(error: RemoteError) -> int:
    """Return the exit code of the rank that failed, which is that of all."""
    if error.interrupted:
        return INTERRUPTED
    return USAGE if error.message.startswith(f"{ConfigError.__name__}: ") else FAILED


def interrupted(error: BaseException, backend: Backend) -> bool:
    """Return whether it was a signal, to this rank or another, that ended the run."""
    heard = error if isinstance(error, RemoteError) else backend.first_failure(wait_s=0.0)
    return isinstance(error, Interrupted) or (heard is not None and heard.interrupted)


def tell(error: BaseException, options: argparse.Namespace) -> int:
    """Print a person's mistake as one message, anything else with its traceback; return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print(f"Interrupted: {error or 'the same command goes on from the last checkpoint'}", file=sys.stderr)
        return INTERRUPTED
    if options.traceback or not isinstance(error, (DisttrainError, OSError)):
        traceback.print_exception(error)
    else:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return USAGE if isinstance(error, ConfigError) else FAILED


if __name__ == "__main__":
    sys.exit(main())
