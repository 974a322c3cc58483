"""`disttrain evaluate RUN`: evaluate a checkpoint of a run by its own config, on one rank or on several.

*Contract*: the cfg.py is the one of the launch that saved the checkpoint, as the run directory keeps it; the modules
that it imports are those that lie there now, and a warning says which have changed. The run may be under way: nothing
is locked or written. Standard output has the values alone. Exit code 0: evaluated; 1: it failed; 2: it cannot be done.
"""

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from disttrain.backend import Backend
from disttrain.checkpoint import on_one_rank, step_in, store_at
from disttrain.commands.closed_output import output_may_close
from disttrain.commands.exit_codes import ALL_GOOD
from disttrain.commands.failures import print_error, report_failure
from disttrain.commands.launch import connect_ranks, resolve_slots
from disttrain.commands.start_ranks import run_ranks
from disttrain.config import Config, load_config, read_stored
from disttrain.errors import ConfigError, DisttrainError
from disttrain.files import json_text, printable
from disttrain.handlers.progress import warn
from disttrain.launching.torchrun import report_exit_code, torchrun_words
from disttrain.run.checkpoint_target import find_target
from disttrain.run.checkpoint_values import CheckpointValues, evaluate_checkpoint
from disttrain.run.directory import RunDirectory
from disttrain.run.launches import KeptLaunch, launch_before, read_launches
from disttrain.run.source_files import source_files


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = evaluate_parser().parse_args(arguments)
    logging.getLogger("disttrain").addHandler(logging.NullHandler())
    with output_may_close():
        try:
            return _start_ranks(options) if options.ranks is not None else report_exit_code(_run(options))
        except (DisttrainError, KeyboardInterrupt) as error:  # before the ranks were started or connected
            return report_exit_code(print_error(error, options))


def evaluate_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="disttrain evaluate",
        description="Evaluate a checkpoint of a run on its validation data, by the cfg.py that the run keeps, which is "
        "a program.",
        epilog="exit codes: 0: evaluated; 1: it failed; 2: a mistake in the command, the config or their code",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run directory, such as runs/digits")
    add("--checkpoint", metavar="best|last|STEP", default="last", help="the checkpoint (default: last, the newest)")
    add("--data", metavar="NAME", help="one set, if valid_data has several by name (default: all)")
    add("--ranks", metavar="N", type=int, help="number of ranks to start on this host (default: this process alone)")
    add("--json", action="store_true", help="print one JSON object")
    add("--traceback", action="store_true", help="print the traceback of every error")
    return parser


def _start_ranks(options: argparse.Namespace) -> int:
    """Start the ranks, each of which calls `main`; return their exit code."""
    if options.ranks < 1:
        raise ConfigError(f"expected --ranks to be at least 1, got {options.ranks}")
    config = load_config(_run_directory(options.run).path)  # report a mistake once, and not on every rank
    arguments = [options.run, "--checkpoint", options.checkpoint]
    arguments += [] if options.data is None else ["--data", options.data]
    arguments += ["--json"] * options.json + ["--traceback"] * options.traceback
    words = torchrun_words(options.ranks, nodes="1", endpoint=None, run_id="evaluate", max_restarts=0)
    with contextlib.redirect_stdout(sys.stderr):  # the command of torchrun; the ranks have standard output
        return run_ranks(words, "disttrain.commands.evaluate", arguments, config)


def _run_directory(run: str) -> RunDirectory:
    path = Path(run)
    if not path.is_dir():
        raise ConfigError(f"{run}: expected a run directory, such as runs/digits, which holds cfg.py and config.json")
    return RunDirectory(path)


def _run(options: argparse.Namespace) -> int:
    """Connect the ranks, evaluate and print; return the exit code."""
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # for what a cfg.py and its handlers print
        return _run_aside(options, output)


def _run_aside(options: argparse.Namespace, output: TextIO) -> int:
    config: Config | None = None
    mistake: ConfigError | None = None
    try:
        config = load_config(_run_directory(options.run).path)
    except ConfigError as error:
        mistake = error
    try:
        backend = connect_ranks(config)
    except DisttrainError as error:
        return print_error(mistake or error, options)
    with backend:
        try:
            with backend.agree("loading the config"):
                if mistake is not None:
                    raise mistake
            assert config is not None
            name, found = _evaluate(options, config, backend)
            if backend.rank == 0:
                print(*texts_of(options, name, found), sep="\n", file=output, flush=True)
            return ALL_GOOD
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - nothing above this can report it
            return report_failure(error, config, backend, options)


def _evaluate(options: argparse.Namespace, newest: Config, backend: Backend) -> tuple[str, CheckpointValues]:
    """Return the name and the values of the checkpoint; `newest` is the config of the run's newest launch."""
    console = Console(stderr=True, quiet=backend.rank != 0, highlight=False, markup=False, emoji=False)
    directory = _run_directory(options.run)
    root, name = on_one_rank(backend, lambda: _choose(options.run, options.checkpoint))
    with backend.agree("loading the config of the checkpoint"):
        launch = launch_before(read_launches(directory.launches, directory.cfg_py), step_in(name))
        config = config_of(directory, newest, launch)
        stored = read_stored(directory.config_json).fields
        config = resolve_slots(config, stored, backend.world_size)
    found = evaluate_checkpoint(config, backend, directory, store_at(root), name, options.data, console)
    for text in changed_modules(config, launch):
        warn(console, text)
    return name, found


def _choose(run: str, wish: str) -> tuple[str, str]:
    """Return the store and the name of the checkpoint that is asked for; on rank 0."""
    if wish not in ("best", "last") and not (wish.isdecimal() and len(wish) <= 15):
        raise ConfigError(f"--checkpoint {wish}: expected best, last or a step")
    step = int(wish) if wish.isdecimal() else None
    target = find_target(run, step, best=wish == "best", elsewhere=True)
    name = target.name or next(iter(target.store.committed()), None)
    if name is None:
        raise ConfigError(f"there are no checkpoints in {target.store}; the run has saved none yet")
    return str(target.store), name


def config_of(directory: RunDirectory, newest: Config, launch: KeptLaunch | None) -> Config:
    """Return the config of a launch: that of the newest, unless the launch kept another cfg.py or other overrides."""
    if launch is None or (text := launch.content("cfg.py")) is None or newest.origin is None:
        return newest
    if (text, tuple(launch.record.overrides)) == (newest.origin.text, newest.origin.overrides):
        return newest
    if launch.number == 0:  # of an older release, which kept the newest cfg.py alone
        return newest
    return load_config(directory.path, kept=(launch.folder / "cfg.py", launch.record.overrides))


def changed_modules(config: Config, launch: KeptLaunch | None) -> list[str]:
    """Return a warning for own modules of the launch that have another content now; they may compute other values."""
    if launch is None or config.origin is None or not launch.record.knows_modules:
        return []
    kept, now = launch.record.files, source_files(config.origin)
    changed = [name for name in sorted(kept.keys() & now.keys() - {"cfg.py"}) if kept[name].sha256 != now[name].sha256]
    names = ", ".join(name.removeprefix("modules/") for name in changed)
    return [f"changed since launch {launch.number}, which saved the checkpoint: {names}"] if changed else []


def texts_of(options: argparse.Namespace, name: str, found: CheckpointValues) -> list[str]:
    """Return the lines to print: the values, and whether the run logged the same."""
    if options.json:
        content: dict[str, Any] = {"run": options.run, "checkpoint": name, **found._asdict()}
        same = None if found.logged is None else not found.differing
        return [json.dumps(json.loads(json_text({**content, "same_as_logged": same})), indent=2)]
    width = max(map(len, found.values)) + 2
    lines = [f"{options.run}, step {found.step}:"]
    lines += [f"  {key:<{width}}{value}" for key, value in found.values.items()]
    if found.logged is None:
        lines.append("the run logged no evaluation at this step")
    elif not found.differing:
        lines.append("the same as the run logged at this step, to the last bit")
    else:
        texts = [f"{key} {found.logged.get(key)}" for key in found.differing]
        lines.append(f"other values than the run logged at this step: {', '.join(texts)}")
    return [printable(line) for line in lines]
