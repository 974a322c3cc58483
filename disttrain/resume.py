"""Where a run goes on: what a checkpoint holds of it, and how the newest good one is taken back.

*Contract*: position, not history: from the step alone follow the epoch, the data's place in it and every seed; what
else is needed lies in the checkpoint. Without one the run stands at step 0.

*Errors*: a checkpoint of other data or of another run, or one beyond the config's end, is refused on every rank.
"""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from disttrain import kept
from disttrain.config import to_json
from disttrain.data import StreamLoader
from disttrain.errors import ConfigError, DataError
from disttrain.handlers.checkpoint import Checkpoint
from disttrain.handlers.progress import dropping
from disttrain.run import Run


def to_save(made: Run) -> dict[str, Any]:
    """Return everything that a checkpoint holds, by name."""
    parts = {
        "model": made.layout.stateful(made.model),
        "optimizer": made.layout.stateful(made.optimizer),
        "trainer": made.trainer,
        "precision": made.precision,
    }
    if made.schedule is not None:
        parts["schedule"] = made.schedule
    if isinstance(made.loader, StreamLoader):
        parts["data"] = made.loader
    return parts


def restore(made: Run, console: Console) -> int:
    """Take the newest good checkpoint, if there is one; return its step, 0 without. Loud where one is damaged."""
    cuts = made.layout.cuts(made.model, made.optimizer)
    found = kept.load(made, cuts)
    warn_of_kernels(made, {} if found is None else found.manifest.position, console)
    step = 0
    if found is not None:
        step, position = found.manifest.step, found.manifest.position
        for name, reason in found.skipped:
            console.print(f"WARNING: checkpoint {name} is damaged: {reason}", style="bold yellow", soft_wrap=True)
        kept.check_run(made, found)
        there = {name: position.get(name) for name in made.data}
        if there != made.data and not made.config.accept_other_data:
            raise DataError(
                f"the training data has changed since the run began: expected {there}, got {made.data}; "
                "restore it, start anew with --fresh, or go on all the same with accept_other_data=true"
            )
        if step > made.total_steps:
            raise ConfigError(
                f"the run stands at step {step}, beyond the {made.total_steps} steps that the config asks for; "
                "ask for more, or start anew with --fresh"
            )
        with made.backend.agree("loading the checkpoint"):
            parts = to_save(made)
            if "data" not in found.state:
                parts.pop("data", None)  # other data, which is accepted: the run began over samples with indices
            Checkpoint.load_objects(parts, {**found.state, "trainer": lengthened(made, found.state["trainer"])})
        made.stands(position)
        kept.check_best(made, console)
        place(made, step, console)
        console.print(f"resuming from step {step} (epoch {made.loader.epoch + 1})")
    with made.backend.agree("describing the run"):
        if made.backend.rank == 0 and (origin := made.config.origin) is not None:
            made.directory.describe(to_json(made.config), origin.file, origin.overrides)
    return step


def warn_of_kernels(made: Run, saved: Mapping[str, Any], console: Console) -> None:
    """Say so where ranks, or what went before, compute with other kernels: nothing is promised then."""
    by_rank = made.backend.all_gather(made.kernels)
    kinds = sorted({*by_rank, str(saved.get("kernels", by_rank[0]))})
    if len(kinds) > 1:
        said = f"expected one kind of kernels for a run, got {'; '.join(kinds)}"
        console.print(f"WARNING: the same bits are not promised: {said}", style="bold yellow", soft_wrap=True)


def lengthened(made: Run, trainer: dict[str, Any]) -> dict[str, Any]:
    """Return the trainer's saved state with the length that the config has now: a resumed run may have another."""
    same = {key: value for key, value in trainer.items() if key not in ("max_epochs", "max_iters", "epoch_length")}
    return {**same, **made.maximum, "epoch_length": made.epoch_length}


def place(made: Run, step: int, console: Console) -> None:
    """Bring the training data to where the run stands, and the trainer's epoch with it."""
    loader = made.loader
    loader.seek(*divmod(step, made.epoch_length or step + 1))
    if isinstance(loader, StreamLoader) and step < made.total_steps:
        with dropping(console, line_every_s=made.config.log.every_s) as show:
            loader.catch_up(show)
    made.trainer.state.epoch = loader.epoch
