"""`python -m disttrain.launch cfg.py [key=value ...]`, in one process or on the ranks of torchrun: train a config.

*Contract*: the rank that fails first prints one message, and every rank ends with an exit code of `MEANINGS`. An
existing run stays untouched until everything that can be checked has been checked.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from disttrain.backend import Backend, connect
from disttrain.backend.determinism import CUBLAS_WORKSPACES
from disttrain.backend.ended_before import mistake_before
from disttrain.commands.closed_output import output_may_close
from disttrain.commands.exit_codes import COMPLETED, FAILED, INTERRUPTED, USAGE
from disttrain.commands.failures import is_interrupted, print_error, report_failure
from disttrain.commands.start_ranks import add_options, start_ranks, take_defaults
from disttrain.commands.summary import print_beginning, print_summary
from disttrain.config import (
    Config,
    Description,
    blocking_differences,
    check_slots,
    config_hash,
    describe,
    differences,
    field_table,
    load_config,
    read_stored,
    replace,
    with_num_slots,
)
from disttrain.environment import LONGEST_GRACE_S, grace_s, launch_ids, set_default
from disttrain.errors import ConfigError, DisttrainError
from disttrain.handlers.preemption import Preemption
from disttrain.launching.end_with_launcher import end_with_launcher
from disttrain.launching.torchrun import report_exit_code
from disttrain.process import set_process_variables
from disttrain.run.directory import RunDirectory
from disttrain.run.length import run_length
from disttrain.run.train import train
from disttrain.version import __version__

SLACK, LEAST_SLACK_S = 0.25, 5.0
"""Collectives wait this much longer than `timeout_s`: the watchdog, which knows the rank that hangs, reports first."""
MEANINGS = {
    COMPLETED: "completed, now or before",
    FAILED: "failed while running; the last checkpoint is kept",
    USAGE: "a mistake in the command, the config, the data or their code; starting it again would not help",
    INTERRUPTED: "interrupted by a signal, after a checkpoint if a step was done; the same command resumes the run",
}

Handlers = Sequence[Callable[[Any, Any], object]]


def main(arguments: Sequence[str] | None = None, *, handlers: Handlers = ()) -> int:
    """Run the command line and return the exit code; `handlers` are called after those of the config."""
    options = launch_parser().parse_intermixed_args(arguments)
    options.words = list(sys.argv[1:] if arguments is None else arguments)
    logging.getLogger("disttrain").addHandler(logging.NullHandler())  # only the ranks' log files get log messages
    with output_may_close():
        return run_options(options, handlers)


def run_options(options: argparse.Namespace, handlers: Handlers) -> int:
    """Start ranks, or run the command in this process, which may be a rank; return the exit code."""
    try:
        if options.grace is not None and not 1 <= options.grace <= LONGEST_GRACE_S:
            raise ConfigError(f"expected --grace to be from 1 to {LONGEST_GRACE_S} seconds, got {options.grace}")
        if not (options.check or options.print_config):
            take_defaults(options)
            if options.ranks is not None:
                return start_ranks(options)
            if options.recover:
                raise ConfigError("--recover: expected ranks to start, got none; add --ranks N")
        with Preemption(starting=True) as preemption:
            return report_exit_code(run_command(options, handlers, preemption))
    except (ConfigError, KeyboardInterrupt) as error:  # before the ranks were started or connected
        return report_exit_code(print_error(error, options))


def run_command(options: argparse.Namespace, handlers: Handlers, preemption: Preemption) -> int:
    """Load the config, connect the ranks and run what the options ask for; return the exit code."""
    config: Config | None = None
    config_error: ConfigError | None = None
    try:
        config = load_config(Path(options.config), options.overrides)
        if handlers:
            config = replace(config, handlers=(*config.handlers, *handlers))
        preemption.grace_s = grace_s() if options.grace is None else float(options.grace)
    except ConfigError as error:
        config_error = error
    if config is not None and options.print_config:
        print(json.dumps(describe(config), indent=2))
        return COMPLETED
    if config is not None and options.check:
        return print_valid(config)
    if mistake_before():
        return USAGE
    try:
        backend = connect_ranks(config)
    except DisttrainError as error:
        return print_error(config_error or error, options)
    with backend:
        preemption.backend = backend
        try:
            with backend.agree("loading the config"):
                if config_error is not None:
                    raise config_error
            assert config is not None
            return check_and_train(config, options, backend, preemption)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - nothing above this can report it
            return report_failure(error, config, backend, options)


def connect_ranks(config: Config | None) -> Backend:
    """Connect this rank as the config says, or by default where the config cannot be loaded."""
    end_with_launcher()
    set_process_variables()  # for the loader's workers, if another program called this
    set_default("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])  # before connecting starts CUDA
    timeout_s = config.timeout_s if config else 60.0
    collectives_s = timeout_s + max(LEAST_SLACK_S, SLACK * timeout_s)
    return connect(config.backend if config else "auto", timeout_s=collectives_s, spmd=asks_spmd(config))


def asks_spmd(config: Config | None) -> bool | None:
    """Return True if one rank is to drive all XLA devices; None leaves it to the backend, False on other devices."""
    if config is None or config.spmd or config.strategy != "fsdp":
        return config is not None and config.spmd
    return None


def launch_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its --help lists every field of a Config."""
    parser = argparse.ArgumentParser(
        prog="python -m disttrain.launch",
        description="Train the config that a cfg.py declares: in one process, or on every rank that --ranks, torchrun "
        "or srun starts. The same command resumes the run from its newest checkpoint.",
        epilog="exit codes: " + "; ".join(f"{code}: {meaning}" for code, meaning in MEANINGS.items()),
        add_help=False,
    )
    add = parser.add_argument
    add("config", metavar="CFG.PY", help="a file that ends in config = Config(...), or a run directory")
    add("overrides", metavar="KEY=VALUE", nargs="*", help="new values of config fields, such as optimizer.lr=3e-4")
    add("--runs", metavar="DIR", type=Path, default=Path("runs"), help="folder of all run directories (default: runs)")
    add("--fresh", action="store_true", help="start a new run; keep the old one under another name")
    add("--print-config", action="store_true", help="print the resolved config, and exit")
    add("--check", action="store_true", help="check the config without starting ranks, and exit")
    add("--traceback", action="store_true", help="print the traceback of every error")
    add_options(parser)
    add("--version", action="version", version=f"disttrain {__version__}", help="print the version, and exit")
    add("-h", "--help", action=_Help, nargs=0, help="print this and every field of a Config, and exit")
    return parser


class _Help(argparse.Action):
    """Prints the usual help, and then the table of all fields of a Config."""

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


def print_valid(config: Config) -> int:
    """Print that the config is valid, as far as a check without ranks and data can find; return the exit code."""
    slots = "as many slots as ranks" if config.num_slots is None else f"{config.num_slots} slots"
    print(f"{config.name}: the config is in order; {slots}, config hash {config_hash(config)[:12]}")
    return COMPLETED


def check_and_train(config: Config, options: argparse.Namespace, backend: Backend, preemption: Preemption) -> int:
    """Compare the config with the other ranks' and with an existing run's, then train; return the exit code."""
    console = Console(quiet=backend.rank != 0, highlight=False, markup=False, emoji=False)
    path = Path(options.config)
    directory = RunDirectory(path if path.is_dir() else options.runs / str(config.name))
    directory.command = ["python", "-m", "disttrain.launch", *options.words]
    fresh = options.fresh and not is_of_this_launch(directory, backend)
    with backend.agree("reading the run directory"):
        if options.fresh and path.is_dir():
            raise ConfigError(f"--fresh: expected a cfg.py, got the run directory {path}; use {path / 'cfg.py'}")
        existing = stored_config(directory) if backend.rank == 0 and not fresh else None
    stored, result = backend.broadcast((existing, directory.result()) if backend.rank == 0 else None)
    with backend.agree("checking the config"):
        config = resolve_slots(config, stored, backend.world_size)
    check_config(config, stored, directory, backend)
    if stored is not None and result is not None and is_finished(result, config):
        if "stopped" in result:
            console.print(
                f"{directory.path} was ended {result['stopped']}; it goes on with a larger early_stop.patience or "
                "early_stop.monitor=none, and --fresh starts a new run",
                soft_wrap=True,
            )
        elif "terminated" in result:
            console.print(
                f"{directory.path} was ended by its own code at step {result['step']:,}; it goes on with another "
                "max_epochs or max_steps, and --fresh starts a new run",
                soft_wrap=True,
            )
        else:
            console.print(f"{directory.path} is completed; --fresh starts a new run", soft_wrap=True)
        print_summary(result, directory, console)
        return COMPLETED
    print_beginning(config, directory, backend, console)
    try:
        result = train(config, backend, directory, console, preemption, fresh=fresh)
    except BaseException as error:
        if backend.rank == 0 and preemption.starting and is_interrupted(error, backend):
            directory.interrupt(fresh=fresh)
        raise
    print_summary(result, directory, console)
    return COMPLETED if result["status"] == "completed" else INTERRUPTED


def is_of_this_launch(directory: RunDirectory, backend: Backend) -> bool:
    """Return True if this launch began the run in the directory, with ranks that have been restarted since.

    Also store the ids of this launch, which the directory's next `open` writes.
    """
    ids = {name: certain for by_rank in backend.all_gather(launch_ids()) for name, certain in by_rank.items()}
    directory.launch_ids = sorted(ids)
    is_own = backend.rank == 0 and any(certain and directory.was_begun_by(name) for name, certain in ids.items())
    return bool(backend.broadcast(is_own))


def stored_config(directory: RunDirectory) -> Description | None:
    """Return the config of the run in the directory, or None if no run has saved anything there."""
    if not directory.has_begun():
        return None
    try:
        return read_stored(directory.config_json).fields
    except OSError as error:
        raise ConfigError(
            f"{directory.config_json} cannot be read: {error.strerror}; restore it, or use --fresh"
        ) from None


def check_config(config: Config, stored: Description | None, directory: RunDirectory, backend: Backend) -> None:
    """Compare the config with the other ranks' and with the run's; ConfigError on every rank if they differ."""
    mine = describe(config)
    by_rank = backend.all_gather(mine)
    for rank, theirs in enumerate(by_rank):
        if differing := differences(by_rank[0], theirs):
            listing = "; ".join(f"{d.field}: rank 0 has {d.old!r}, rank {rank} has {d.new!r}" for d in differing)
            raise ConfigError(
                f"the ranks have different configs: {listing}; start all with the same cfg.py and overrides"
            )
    # A run directory may be renamed, so the name with which the run began may differ.
    if stored is not None and (differing := blocking_differences({**stored, "name": mine["name"]}, mine)):
        raise ConfigError(
            f"{directory.path} holds a run of another config: {'; '.join(map(str, differing))}. "
            "Use its values, give this run another name=NAME, or start a new run with --fresh"
        )


def resolve_slots(config: Config, stored: Description | None, world_size: int) -> Config:
    """Return the config with its number of slots: its own, the stored run's, or the world size."""
    of_run = None if stored is None else stored.get("num_slots")
    num_slots = config.num_slots or (of_run if isinstance(of_run, int) else None)
    return with_num_slots(config, check_slots(config.global_batch_size, num_slots, world_size))


def is_finished(result: dict[str, Any], config: Config) -> bool:
    """Return True if a run with this result has nothing left to do under this config."""
    if result.get("status") != "completed":
        return False
    if "stopped" in result and result.get("early_stop") == config.early_stop.model_dump():
        return True
    if "terminated" in result:
        return bool(result["terminated"] == run_length(config))
    if config.max_steps is not None:
        return int(result["step"]) >= config.max_steps
    whole_epochs = int(result["epoch"]) - ("stopped" in result)  # an early end may lie inside an epoch
    return whole_epochs >= (config.max_epochs or 0)
