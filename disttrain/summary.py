"""What a person reads of a run: that it begins, and how it ended."""

import os
from typing import Any

from rich.console import Console

from disttrain import kept
from disttrain.backend import Backend
from disttrain.config import Config
from disttrain.handlers.progress import number
from disttrain.run_directory import RunDirectory
from disttrain.version import __version__


def greet(config: Config, directory: RunDirectory, backend: Backend, console: Console) -> None:
    """Say what is about to run, where, and how many cores stay idle."""
    ranks = f"{backend.world_size} rank" + "s" * (backend.world_size > 1)
    device = f"{backend.num_devices} devices as one" if backend.num_devices > 1 else str(backend.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = backend.local_world_size * (config.cpu_threads + config.num_workers)
    idle = f", {cores - busy} of {cores} cores idle" if busy < cores else ""
    threads = f"{config.cpu_threads} thread{'s' * (config.cpu_threads > 1)} a rank{idle}"
    precision = getattr(config.precision, "__name__", config.precision)
    console.print(
        f"disttrain {__version__}: {config.name} on {ranks} ({backend.name}, {device}), "
        f"{config.num_slots} slots, {precision}, {threads}; in {directory.path}",
        soft_wrap=True,
    )


def summarise(result: dict[str, Any], directory: RunDirectory, console: Console) -> None:
    """Print the end of a run as a person wants to read it."""
    rows = {
        "steps": f"{result['step']:,} ({result['epoch']} epochs), {result['status']}"
        + (f"; the updates of {result['skipped_steps']:,} were left out" if result["skipped_steps"] else ""),
        **{f"validation {name}": number(value) for name, value in result["metrics"].items()},
        **best_row(result, directory),
        "pace": f"{result['samples_per_second']:,.0f} samples/s, {result['wall_s']:.1f} s",
        "checkpoint": kept.where(directory, result["checkpoint"]),
        "metrics": directory.metrics,
        "logs": directory.logs,
        "weights": f"sha256 {result['params_sha256']}",
    }
    if "xla_compilations" in result:
        steady = result["xla_compilations_after_step_2"]
        rows["compiled"] = f"{result['xla_compilations']} programs, {steady} of them after step 2"
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        console.print(f"{name:<{width}}{value}", soft_wrap=True)


def best_row(result: dict[str, Any], directory: RunDirectory) -> dict[str, str]:
    """Return which evaluation was the best and where its checkpoint lies, if the run keeps that."""
    if "best" not in result:
        return {}
    best = result["best"]
    where = kept.where(directory, best["checkpoint"])
    return {f"best {best['monitor']}": f"{number(best['value'])} at step {best['step']:,}, kept in {where}"}
