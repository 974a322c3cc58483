"""`disttrain replay RUN --step N`: compute a step of a run again, in one process, and show it slot by slot.

*Contract*: RUN is only read, and not locked. The code is that of the launch that did the step, as the run keeps it.
Standard output has the step alone. If launches with different code lie between the checkpoint and the step, the steps
of each are computed in a process of its own. Exit code 0: each step has the bits of the run's ledger; 1: one has not;
2: it cannot be done.
"""

import argparse
import bdb
import contextlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from rich.console import Console
from torch import nn

from disttrain.backend import Backend
from disttrain.checkpoint import step_in, store_at
from disttrain.commands.closed_output import output_may_close
from disttrain.commands.exit_codes import DIFFERENT, INTERRUPTED, SAME
from disttrain.commands.failures import print_error, report_failure
from disttrain.commands.launch import connect_ranks, resolve_slots
from disttrain.commands.replay_report import print_step, step_json
from disttrain.commands.replayed_code import Code, code_for, segments
from disttrain.config import Config, read_stored
from disttrain.environment import variables_with
from disttrain.errors import ConfigError, DisttrainError
from disttrain.evidence import read_ledger
from disttrain.evidence.ledger import Line
from disttrain.evidence.module_outputs import ModuleOutputs
from disttrain.files import json_text
from disttrain.handlers.progress import warn
from disttrain.launching.torchrun import report_exit_code
from disttrain.run.directory import RunDirectory
from disttrain.run.launches import read_launches
from disttrain.run.replay import Replay, Replayed, replay_config
from disttrain.run.replay_start import Start, starts_before
from disttrain.run.replayed_slots import Before, SlotWatcher
from disttrain.run.slot_debugger import open_debugger


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = replay_parser().parse_args(arguments)
    logging.getLogger("disttrain").addHandler(logging.NullHandler())
    with output_may_close(), contextlib.ExitStack() as stack:
        try:
            folder = Path(options.to or stack.enter_context(tempfile.TemporaryDirectory(prefix="replay-")))
            return report_exit_code(_run(options, folder))
        except KeyboardInterrupt:
            print("Interrupted: the run is as it was", file=sys.stderr)
            return INTERRUPTED
        except DisttrainError as error:
            return report_exit_code(print_error(error, options))


def replay_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="disttrain replay",
        description="Compute one step of a run again in this process, from the checkpoint before it, by the cfg.py "
        "that the run keeps, which is a program. Each step on the way must have the bits of the run's ledger. Prints "
        "the samples, losses and gradient norms of the step by slot.",
        epilog="exit codes: 0: the same bits as the run; 1: a step differs, which is named; 2: a mistake in the "
        "command, the config or their code",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run directory, such as runs/digits; the run may be under way")
    add("--step", metavar="N", type=int, required=True, help="the step to compute, counted from 1")
    add("--slot", metavar="S", type=int, help="compute and show only this slot of the step, counted from 0")
    add("--debug", action="store_true", help="open pdb before model(x) of the slot (default: slot 0)")
    add(
        "--modules",
        metavar="FILE",
        nargs="?",
        const="-",
        help="write a hash and the largest value of every module's output and gradient, a JSON object a line, to FILE "
        "(default: standard output, in place of the table)",
    )
    add("--json", action="store_true", help="print one JSON object")
    add(
        "--code",
        choices=("kept", "now"),
        default="kept",
        help="import your modules as the run keeps them, where they have changed, or as they are now (default: kept)",
    )
    add("--unproven", action="store_true", help="go on after a step that differs from the run's ledger")
    add("--traceback", action="store_true", help="print the traceback of every error")
    for name, kind in (("--config", Path), ("--start", int), ("--source", Path), ("--to", Path), ("--launch", int)):
        add(name, type=kind, help=argparse.SUPPRESS)  # of `bisect`, and of the processes that are started here
    add("--saves", action="store_true", help=argparse.SUPPRESS)
    return parser


class Unproven(DisttrainError):
    """Steps of a launch before that of the replayed step, which could not be computed again."""


class _Plan(NamedTuple):
    """The run, and the code and the points from which its step can be computed."""

    directory: RunDirectory
    lines: dict[int, Line]
    starts: list[Start]
    code: Code


def _run(options: argparse.Namespace, folder: Path) -> int:
    """Connect this process, replay the step and print it; return the exit code."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    output = sys.stdout
    aside = contextlib.nullcontext() if options.debug else contextlib.redirect_stdout(sys.stderr)
    with aside:  # for what a cfg.py and its handlers print; a debugger needs the terminal
        plan = _plan(options, folder, console)
        with plan.code.imported():
            config = plan.code.load()
            backend = connect_ranks(config)
            with backend:
                try:
                    _check(options, config, backend)
                    stored = read_stored(plan.directory.config_json).fields
                    config = replay_config(resolve_slots(config, stored, backend.world_size))
                    return _replay(options, plan, config, backend, folder, console, output)
                except bdb.BdbQuit:
                    print(f"left the debugger in step {options.step}", file=sys.stderr)
                    return SAME
                except Exception as error:  # noqa: BLE001 - nothing above this can report it
                    return report_failure(error, config, backend, options)


def _plan(options: argparse.Namespace, folder: Path, console: Console) -> _Plan:
    """Read the run, compute the steps of launches with other code, and choose the code of the step."""
    if options.debug and options.modules:
        raise ConfigError("expected --debug or --modules, got both")
    path = Path(options.run)
    if not path.is_dir():
        raise ConfigError(f"{options.run}: expected a run directory, such as runs/digits, got no directory")
    directory = RunDirectory(path)
    lines = read_ledger(directory.ledger_jsonl)
    check_step(options.step, directory, lines)
    launches = read_launches(directory.launches, directory.cfg_py)
    starts = starts_before(directory, launches, options.step, console)
    if options.source is not None:
        store = store_at(options.source)
        starts = [Start(step_in(name), store, name) for name in store.committed()[:1]]
    elif options.start is not None:
        starts = [start for start in starts if start.step == options.start]
    parts = [] if options.config or options.launch else segments(launches, starts[0].step, options.step)
    begins = ["--start", str(starts[0].step)]
    for launch, last in parts[:-1]:
        console.print(f"steps up to {last} are those of launch {launch.number}, which had other code", soft_wrap=True)
        source = _other_process(options, folder, begins, launch.number, last)
        begins = ["--source", str(source)]
        label = f"the state after step {last}, computed with the code of launch {launch.number}"
        starts = [Start(last, store_at(source), store_at(source).committed()[0], label)]
    code = code_for(options, directory, launches, folder / "code", console)
    return _Plan(directory, lines, starts, code)


def check_step(step: int, directory: RunDirectory, lines: dict[int, Line]) -> None:
    """Raise ConfigError unless the ledger has the step."""
    if step in lines and step > 0:
        return
    last = max(lines)
    so_far = " so far, and the run is going on" if directory.is_in_use() else ""
    raise ConfigError(f"--step {step}: there is no such step: the ledger of {directory.path} has 1 to {last}{so_far}")


def _other_process(options: argparse.Namespace, folder: Path, begins: list[str], launch: int, last: int) -> Path:
    """Compute the steps up to `last` with the code of another launch, in a process; return the folder of its state."""
    place = folder / f"launch-{launch}"
    words = [sys.executable, "-m", "disttrain", "replay", options.run, "--step", str(last), "--launch", str(launch)]
    words += [*begins, "--to", str(place), "--saves", "--json", "--code", options.code]
    words += ["--unproven"] * options.unproven
    done = subprocess.run(words, stdout=subprocess.DEVNULL, check=False, env=variables_with(import_path()))
    if done.returncode != SAME and not (options.unproven and done.returncode == DIFFERENT):
        raise Unproven(f"the steps up to {last}, of launch {launch}, could not be computed as they were: see above")
    (checkpoints,) = place.glob("*/checkpoints")
    return Path(checkpoints)


def import_path(*first: str) -> dict[str, str]:
    """Return the variable with which another interpreter imports this package, and before it from these folders."""
    root, present = Path(__file__).parents[2], variables_with({}).get("PYTHONPATH")
    # In a folder of installed packages lie all packages of this interpreter, which another one does not need.
    own = [] if root.name in ("site-packages", "dist-packages") else [str(root)]
    return {"PYTHONPATH": os.pathsep.join([*first, *own, *([present] if present else [])])}


def _check(options: argparse.Namespace, config: Config, backend: Backend) -> None:
    """Raise ConfigError for what cannot be replayed so."""
    if backend.world_size > 1:
        raise ConfigError(f"expected one process, got {backend.world_size} ranks; start `disttrain replay` by itself")
    if (options.modules or options.debug) and config.compile:
        wish = "--modules" if options.modules else "--debug"
        raise ConfigError(f"{wish}: the model is compiled (compile=true), so its modules are not called one by one")


def _replay(
    options: argparse.Namespace,
    plan: _Plan,
    config: Config,
    backend: Backend,
    folder: Path,
    console: Console,
    output: TextIO,
) -> int:
    num_slots = config.num_slots or 1
    slot = 0 if options.slot is None else options.slot
    if not 0 <= slot < num_slots:
        raise ConfigError(f"--slot {slot}: expected one of the run's slots, 0 to {num_slots - 1}")
    before: Before | None = open_debugger(slot) if options.debug else None
    with contextlib.ExitStack() as stack:
        outputs = _outputs(options.modules, output, stack)
        watcher = SlotWatcher(options.step, only=options.slot, before=before, outputs=outputs)
        shadow = RunDirectory(folder / str(config.name))
        shadow.path.mkdir(parents=True, exist_ok=True)
        reasons = [] if options.config else plan.code.reasons(config)
        parts = (config, backend, plan.directory, shadow, plan.lines, console)
        replayed = Replay(*parts, reasons=reasons, saves=options.saves, proves=not options.unproven).run(
            plan.starts, watcher
        )
    _print(options, replayed, console, output)
    return SAME if replayed.differs is None else DIFFERENT


def _outputs(
    modules: str | None, output: TextIO, stack: contextlib.ExitStack
) -> Callable[[nn.Module], ModuleOutputs] | None:
    """Return a function that makes the recorder of the modules' outputs; None without `--modules`."""
    if modules is None:
        return None
    file = output
    if modules != "-":
        try:
            file = stack.enter_context(open(modules, "w", encoding="utf-8"))  # noqa: SIM115 - the stack closes it
        except OSError as error:
            raise ConfigError(f"--modules {modules}: it cannot be written: {error.strerror}") from None
    return lambda model: ModuleOutputs(model, lambda record: print(json_text(record), file=file))


def _print(options: argparse.Namespace, replayed: Replayed, console: Console, output: TextIO) -> None:
    if replayed.left_out is not None:
        warn(
            console,
            f"the run left step {replayed.step} out ({replayed.left_out}): here it is computed as it was before that, "
            "and the ledger has no results to prove it by",
        )
    if options.json:
        print(step_json(options.run, replayed), file=output, flush=True)
    elif options.modules != "-":
        print_step(options.run, replayed, output, whole=options.slot is not None)
