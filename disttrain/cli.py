"""The `disttrain` command: one word for each thing that people do around a run."""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from disttrain import checkpoint_command, launch, verify
from disttrain.errors import ConfigError
from disttrain.observe import compare_runs
from disttrain.run_directory import RunDirectory
from disttrain.version import __version__

PACKAGES = ("torch", "numpy", "pydantic", "rich", "safetensors", "torchmetrics", "tensorboard", "torch_xla")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line's word; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["launch"]:
        return launch.main(words[1:])
    if words[:1] == ["verify"]:
        return verify.main(words[1:])
    if words[:1] == ["checkpoint"]:
        return checkpoint_command.main(words[1:])
    parser = argparse.ArgumentParser(
        prog="disttrain", description="Distributed training that resumes to the same bits."
    )
    parser.add_argument("--version", action="version", version=f"disttrain {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("launch", add_help=False, help="train a cfg.py, as python -m disttrain.launch does")
    commands.add_parser("verify", add_help=False, help="run a cfg.py killed and resized, and compare every bit")
    commands.add_parser("checkpoint", add_help=False, help="list, show, verify or prune a run's checkpoints")
    compare = commands.add_parser("compare", help="find the first step at which two runs differ, and what differs")
    for name in ("RUN_A", "RUN_B"):
        compare.add_argument(name.lower(), metavar=name, type=Path, help="a run directory, such as runs/digits")
    commands.add_parser("doctor", help="show versions, devices and backends of this machine")
    options = parser.parse_args(words)
    if options.command == "compare":
        return compare_command(options.run_a, options.run_b)
    return doctor(Console(highlight=False))


def compare_command(first: Path, second: Path) -> int:
    """Print where two runs differ; 0: nowhere, 1: somewhere, 2: they cannot be compared."""
    console = Console(highlight=False, markup=False, emoji=False)
    try:
        comparison = compare_runs(RunDirectory(first), RunDirectory(second))
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return verify.USAGE
    for text in comparison.configs:
        console.print(f"the configs differ in {text}", soft_wrap=True)
    ends = comparison.last_steps
    if ends[0] != ends[1]:
        console.print(
            f"{first} has {ends[0]} steps, {second} has {ends[1]}; compared are those of both", soft_wrap=True
        )
    if not comparison.same:
        verify.tell(comparison, console)
    else:
        console.print(
            f"the same bits: {comparison.num_steps} steps, the whole state at {comparison.num_hashed} of them",
            soft_wrap=True,
        )
    for text in comparison.other:
        console.print(text, soft_wrap=True)
    return verify.SAME if comparison.same else verify.DIFFERENT


def doctor(console: Console) -> int:
    """Print what a bug report needs to say about the machine."""
    table = Table.grid(padding=(0, 2))
    table.add_row("disttrain", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        try:
            table.add_row(name, version(name))
        except PackageNotFoundError:
            table.add_row(name, "not installed")
    table.add_row("cores", str(os.cpu_count()))
    accelerator = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if accelerator is not None else 0
    table.add_row("accelerator", "none" if accelerator is None else f"{count} x {accelerator.type}")
    for name, there in (
        ("gloo", torch.distributed.is_available() and torch.distributed.is_gloo_available()),
        ("nccl", torch.distributed.is_available() and torch.distributed.is_nccl_available()),
    ):
        table.add_row(f"backend {name}", "yes" if there else "no")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
