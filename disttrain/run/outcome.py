"""Makes the content of result.json at the end of a launch, after checking that all ranks hold the same weights."""

import platform
from collections.abc import Mapping
from typing import Any

import torch

from disttrain.checkpoint import checkpoint_name
from disttrain.errors import DisttrainError
from disttrain.evidence import params_sha256
from disttrain.handlers.step_end import StepEnd
from disttrain.run.rollback import Attempts
from disttrain.run.state import Run
from disttrain.version import __version__


def outcome(run: Run, end: StepEnd, attempts: Attempts) -> dict[str, Any]:
    """Check that all ranks hold the same weights, and return the content of result.json."""
    backend, step = run.backend, run.trainer.state.iteration
    digests = backend.all_gather(params_sha256(run.model, run.layout.whole))
    if len(set(digests)) > 1:
        listing = ", ".join(f"rank {rank}: {digest[:12]}" for rank, digest in enumerate(digests))
        raise DisttrainError(f"the ranks ended with different weights ({listing}), expected the same on each")
    trained, wall_s = (step - attempts.first_step) * run.config.global_batch_size, attempts.wall_s
    return {
        "status": "interrupted" if end.interrupted else "completed",
        "step": step,
        "epoch": run.epochs_begun,
        "metrics": end.metrics,
        "params_sha256": digests[0],
        "world_size": backend.world_size,
        "num_slots": run.slots.num_slots,
        "checkpoint": checkpoint_name(end.saved_at),
        **best_entry(run, end.saved_at),
        **({} if run.terminated is None else {"terminated": run.terminated}),
        **({} if run.stopped is None else {"stopped": run.stopped, "early_stop": run.config.early_stop.model_dump()}),
        **({} if run.audited is None else run.audited.entry()),
        **({} if run.begin is None else {"init_from": run.begin._asdict()}),
        "skipped_steps": run.skipped_steps,
        "rollbacks": len(run.left_out),
        "samples_per_second": round(trained / max(wall_s, 1e-9), 1),
        "wall_s": round(wall_s, 3),
        "disttrain": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(backend.device),
        "precision": run.precision.name,
    }


def best_entry(run: Run, saved_at: int) -> Mapping[str, Any]:
    """Return the entry of result.json about the best evaluation; empty if none is wanted, found or saved."""
    found = None if run.best is None else run.best.found
    if found is None or found.step > saved_at:
        return {}
    return {"best": {**found._asdict(), "checkpoint": checkpoint_name(found.step)}}
