"""Print the first line of a run, and the summary at its end."""

import os
from typing import Any

from rich.console import Console

from disttrain.backend import Backend
from disttrain.config import Config
from disttrain.files import printable
from disttrain.handlers.progress import value_text, warn
from disttrain.pod import note_end
from disttrain.process import differences_of_process
from disttrain.run import checkpoint_places
from disttrain.run.directory import RunDirectory
from disttrain.version import __version__


def print_beginning(config: Config, directory: RunDirectory, backend: Backend, console: Console) -> None:
    """Print the run that begins, its directory, and the number of idle cores."""
    ranks = f"{backend.world_size} rank" + "s" * (backend.world_size > 1)
    device = f"{backend.num_devices} devices as one" if backend.num_devices > 1 else str(backend.device)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_busy = backend.local_world_size * (config.cpu_threads + config.num_workers)
    idle = f", {num_cores - num_busy} of {num_cores} cores idle" if num_busy < num_cores else ""
    threads = f"{config.cpu_threads} thread{'s' * (config.cpu_threads > 1)} a rank{idle}"
    precision = getattr(config.precision, "__name__", config.precision)
    console.print(
        f"disttrain {__version__}: {config.name} on {ranks} ({backend.name}, {device}), "
        f"{config.num_slots} slots, {precision}, {threads}; in {directory.path}",
        soft_wrap=True,
    )
    if differences := differences_of_process():
        warn(
            console,
            f"the same bits are not promised, because another program began this process: {'; '.join(differences)}. "
            "`disttrain launch` and `python -m disttrain.launch` see to that (docs/guarantees.md)",
        )


def print_summary(result: dict[str, Any], directory: RunDirectory, console: Console) -> None:
    """Print the content of result.json, and the paths of the run's files, as a table; note the end for the pod."""
    ended = "completed" if result["status"] == "completed" else "interrupted by a signal; the same command resumes it"
    note_end(f"{directory.path}: step {result['step']:,}, {ended}")
    rows = {
        "steps": f"{result['step']:,} ({result['epoch']} epochs), {result['status']}"
        + ("; ended by its own code" if "terminated" in result else "")
        + (f"; the updates of {result['skipped_steps']:,} were left out" if result["skipped_steps"] else ""),
        **({"ended": result["stopped"]} if "stopped" in result else {}),
        **{f"validation {name}": value_text(value) for name, value in result["metrics"].items()},
        **_best_row(result, directory),
        "pace": f"{result['samples_per_second']:,.0f} samples/s, {result['wall_s']:.1f} s",
        "checkpoint": checkpoint_places.location(directory, result["checkpoint"]),
        "metrics": directory.metrics,
        "logs": directory.logs,
        "weights": f"sha256 {result['params_sha256']}",
    }
    if "xla_compilations" in result:
        num_late = result["xla_compilations_after_step_2"]
        rows["compiled"] = f"{result['xla_compilations']} programs, {num_late} of them after step 2"
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        console.print(printable(f"{name:<{width}}{value}"), soft_wrap=True)


def _best_row(result: dict[str, Any], directory: RunDirectory) -> dict[str, str]:
    """Return the row of the best evaluation and its checkpoint; empty if the run keeps none."""
    if "best" not in result:
        return {}
    best = result["best"]
    kept_in = checkpoint_places.location(directory, best["checkpoint"])
    return {f"best {best['monitor']}": f"{value_text(best['value'])} at step {best['step']:,}, kept in {kept_in}"}
