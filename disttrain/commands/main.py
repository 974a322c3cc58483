"""`disttrain COMMAND`: run the command that the first word names.

Each command is imported when it runs, because a process that trains has to be settled before torch is imported.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from disttrain.commands.closed_output import output_may_close
from disttrain.process import begin_process
from disttrain.version import __version__

_OWN_PARSERS = ("launch", "verify", "checkpoint", "evaluate", "runs", "launchers", "replay", "bisect")
"""The commands that parse their own words."""
_TRAINS = ("launch", "verify", "evaluate", "replay", "bisect")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None and words and words[0] in _TRAINS:
        begin_process()
    with output_may_close():
        return run_words(words)


def run_words(words: Sequence[str]) -> int:
    """Run the command that the first word names; return the exit code."""
    if words and words[0] == "export":  # the short name of a command
        words = ["checkpoint", *words]
    if words and words[0] in _OWN_PARSERS:
        code: int = import_module(f"disttrain.commands.{words[0]}").main(words[1:])
        return code
    parser = argparse.ArgumentParser(
        prog="disttrain",
        description="Distributed PyTorch training that is killed anywhere, resumed on any number of ranks, and gives "
        "the same bits.",
        epilog="`disttrain COMMAND --help` describes a command.",
    )
    parser.add_argument(
        "--version", action="version", version=f"disttrain {__version__}", help="print the version, and exit"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("launch", add_help=False, help="train the config of a cfg.py, or resume its run")
    commands.add_parser(
        "verify", add_help=False, help="check that a config gives the same bits when killed and resized"
    )
    commands.add_parser(
        "checkpoint", add_help=False, help="list, show, verify, prune or export the checkpoints of a run"
    )
    commands.add_parser("export", add_help=False, help="write the weights of a run for other programs")
    commands.add_parser("runs", add_help=False, help="list the runs of a folder, what differs in them, and results")
    commands.add_parser("evaluate", add_help=False, help="evaluate a checkpoint of a run on its validation data")
    commands.add_parser(
        "launchers", add_help=False, help="list or copy the launchers for Kubernetes, Ray, SkyPilot, Slurm and others"
    )
    commands.add_parser("replay", add_help=False, help="compute one step of a run again, and look into it")
    commands.add_parser("bisect", add_help=False, help="find the first step and module that differ under other code")
    compare = commands.add_parser(
        "compare",
        help="find the first step at which two runs differ",
        description="Find the first step at which two runs differ, and the part of the step that differs.",
        epilog="exit codes: 0: no difference; 1: a difference; 2: the runs cannot be compared",
    )
    for name in ("RUN_A", "RUN_B"):
        compare.add_argument(name.lower(), metavar=name, type=Path, help="a run directory, such as runs/digits")
    doctor_help = "print the versions, devices and backends of this machine, for a bug report"
    commands.add_parser("doctor", help=doctor_help, description=f"{doctor_help.capitalize()}.")
    options = parser.parse_args(words)
    if options.command == "compare":
        from disttrain.commands.compare import compare_command

        return compare_command(options.run_a, options.run_b)
    from rich.console import Console

    from disttrain.commands.doctor import doctor

    return doctor(Console(highlight=False))
