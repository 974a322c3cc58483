"""The `disttrain` command: one word for each thing that people do around a run."""

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from disttrain import launch
from disttrain.version import __version__

PACKAGES = ("torch", "numpy", "pydantic", "rich", "safetensors", "torchmetrics", "tensorboard", "torch_xla")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line's word; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["launch"]:
        return launch.main(words[1:])
    parser = argparse.ArgumentParser(
        prog="disttrain", description="Distributed training that resumes to the same bits."
    )
    parser.add_argument("--version", action="version", version=f"disttrain {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("launch", add_help=False, help="train a cfg.py, as python -m disttrain.launch does")
    commands.add_parser("doctor", help="show versions, devices and backends of this machine")
    parser.parse_args(words)
    return doctor(Console(highlight=False))


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
