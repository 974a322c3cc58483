"""`disttrain doctor`: print the versions, devices and backends of this machine, for a bug report."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from disttrain.devices import process_groups
from disttrain.version import __version__

PACKAGES = ("torch", "numpy", "pydantic", "rich", "torchmetrics", "tensorboard", "torch_xla")


def doctor(console: Console) -> int:
    """Print a table of versions, devices and backends; return the exit code, 0."""
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
    for name in process_groups().values():
        is_available = torch.distributed.is_available() and torch.distributed.is_backend_available(name)
        table.add_row(f"backend {name}", "yes" if is_available else "no")
    console.print(table)
    return 0
