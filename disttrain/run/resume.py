"""The state that a checkpoint holds of a run, and how a run resumes from the newest good checkpoint.

*Contract*: position, not history. The step alone gives the epoch, the place in the data and every seed; everything else
that changes is in the checkpoint. Without a checkpoint the run begins at step 0.

*Errors*: on every rank a ConfigError or DataError for a checkpoint of other data, of another run, or beyond the end
that the config asks for.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from disttrain.checkpoint import Loaded
from disttrain.checkpoint.state_tree import flatten
from disttrain.data import StreamLoader
from disttrain.errors import CheckpointError, ConfigError, DataError
from disttrain.handlers.checkpoint import Checkpoint
from disttrain.handlers.progress import dropping, warn
from disttrain.handlers.stateful import bare
from disttrain.parallel.counterparts import Counterparts
from disttrain.run import checkpoint_places
from disttrain.run.beginning import warn_of_other_weights
from disttrain.run.built_values import built_values
from disttrain.run.freezing import FLAGS, GROUPS
from disttrain.run.note_launch import note_launch
from disttrain.run.restored import check_restored, state_difference
from disttrain.run.samples import compare_samples
from disttrain.run.state import Run

OPTIMIZER, TRAINER, PRECISION, SCHEDULE, DATA, KEPT = "optimizer", "trainer", "precision", "schedule", "data", "kept"
EVALUATED, TRAIN_METRICS = "evaluated", "train_metrics"
"""The parts of a checkpoint's state, by name, beside those of `Run.parts`."""


def to_save(run: Run) -> dict[str, Any]:
    """Return the objects whose states a checkpoint holds, by name."""
    parts: dict[str, Any] = {
        **{name: run.layout.stateful(part) for name, part in run.parts.items()},
        OPTIMIZER: run.layout.stateful(run.optimizer),
        TRAINER: run.trainer,
        PRECISION: run.precision,
    }
    if run.schedule is not None:
        parts[SCHEDULE] = run.schedule
    if isinstance(run.loader, StreamLoader):
        parts[DATA] = run.loader
    if run.evaluated.is_followed:
        parts[EVALUATED] = run.evaluated
    if run.slot_results.metrics is not None:
        parts[TRAIN_METRICS] = run.slot_results.metrics
    if run.kept:
        parts[KEPT] = {name: run.layout.stateful(kept_object) for name, kept_object in run.kept.items()}
    return parts


def check_state(run: Run) -> None:
    """Encode the state that checkpoints will hold once; ConfigError on every rank for a value that they cannot hold."""
    with run.backend.agree("encoding the state"):
        parts = to_save(run)
        kept = parts.pop(KEPT, {})
        named = {**parts, **{f"run.keep({name!r}, ...)": kept_object for name, kept_object in kept.items()}}
        for name, part in named.items():
            try:
                flatten(bare(part).state_dict())
            except CheckpointError as error:
                raise ConfigError(f"{name}: its state cannot be saved: {error}") from error


def restore(run: Run, console: Console) -> int:
    """Load the newest good checkpoint, if there is one; return its step, or 0. Print a warning for damaged ones."""
    found = checkpoint_places.load_newest_checkpoint(run)
    built = built_values(run)
    if found is not None:
        for name, reason in found.skipped:
            warn(console, f"checkpoint {name} is damaged: {reason}")
    step = restore_from(run, found, console)
    if found is not None:
        warn_of_other_weights(run, console)
        checkpoint_places.check_best(run, console)
        if run.early_stop is not None and run.early_stop.changed:
            warn(console, run.early_stop.changed)
        place = "" if found.place == str(run.directory.checkpoints) else f", from {found.place}"
        console.print(f"resuming from step {step} (epoch {run.loader.epoch + 1}){place}", soft_wrap=True)
    note_launch(run, step, built, console)
    return step


def restore_from(run: Run, found: Loaded | None, console: Console) -> int:
    """Put the run where a loaded checkpoint stands, without one where it begins; return the step. Nothing is saved."""
    position = {} if found is None else found.manifest.position
    same_kernels = warn_of_kernels(run, position, console)
    step = 0
    if found is not None:
        step = found.manifest.step
        check_position(run, step, position)
        load_parts(run, found.state, position, console)
        run.load_position(position)
        check_freezing(run, position)
        run.loader.seek(*divmod(step, run.epoch_length or step + 1))
    compare_samples(run, position, same_kernels, console)
    if found is not None:
        catch_up_data(run, step, console)
        if FLAGS in position:  # a checkpoint of an older release does not know
            run.freezing.hold(run.trainer, partial(warn, console), inside_epoch=run.loader.step > 0)
    return step


def check_position(run: Run, step: int, position: Mapping[str, Any]) -> None:
    """Raise for a checkpoint of other training data, or of a later step than the config's last."""
    there = {name: position.get(name) for name in run.data}
    if there != run.data and not run.config.accept_other_data:
        changed = [name for name in run.data if there[name] != run.data[name]]
        what = "the order of the training data" if changed[0].startswith("order_") else "the training data"
        raise DataError(
            f"{what} has changed since the run began: expected {there}, got {run.data}; "
            "restore it, start anew with --fresh, or go on all the same with accept_other_data=true"
        )
    if step > run.total_steps:
        raise ConfigError(
            f"the run stands at step {step}, beyond the {run.total_steps} steps that the config asks for; "
            "ask for more, or start anew with --fresh"
        )


def check_freezing(run: Run, position: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the same parameters are frozen, and in the same groups, as in the checkpoint."""
    saved = {key: position[key] for key in (FLAGS, GROUPS) if key in position}
    if (difference := state_difference(saved, run.freezing.position(), "position")) is not None:
        path, expected, got = difference
        raise CheckpointError(
            f"{path} was not restored as it was saved: expected {expected}, got {got}. A load_state_dict changes it; "
            "leave requires_grad and the optimizer's groups to the checkpoint, or begin anew with --fresh"
        )


def load_parts(run: Run, saved: Mapping[str, Any], position: Mapping[str, Any], console: Console) -> None:
    """Load a checkpoint's state into the parts of the run; warn about parts that only one of the two has."""
    needed = ("model", OPTIMIZER, TRAINER, PRECISION)
    if missing := [name for name in needed if not isinstance(saved, Mapping) or name not in saved]:
        raise CheckpointError(
            f"expected the checkpoint of a run, got one without {' and '.join(missing)}; remove it, or begin anew"
        )
    parts, state = to_save(run), dict(saved)
    if run.frozen is not None:
        state = run.frozen.completed(state, position)
    if DATA not in state:
        parts.pop(DATA, None)  # other data, which is accepted: the run began over samples with indices
    if EVALUATED not in state:
        parts.pop(EVALUATED, None)  # nothing followed the evaluations when the checkpoint was saved
    if TRAIN_METRICS not in state:
        parts.pop(TRAIN_METRICS, None)  # they are new
    modules = [name for name in run.parts if name in state]
    for name in sorted(set(run.parts) - set(modules)):
        parts.pop(name)
        warn(
            console, f"the checkpoint holds no state of the {name}, which has one now: it begins as the config makes it"
        )
    state[TRAINER] = with_user_keys(run, with_present_length(run, state[TRAINER]), console)
    kept, saved_kept = parts.pop(KEPT, {}), state.pop(KEPT, {})
    for name in sorted(set(kept) - set(saved_kept)):
        warn(console, f"the checkpoint holds no {name!r}, which a handler keeps: it begins anew")
    for name in sorted(set(saved_kept) - set(kept)):
        warn(console, f"the checkpoint holds {name!r}, which no handler keeps now: its state is dropped")
    counterparts = Counterparts(run.parts, run.optimizer, run.kept)
    both = [name for name in kept if name in saved_kept]
    with run.backend.agree("loading the checkpoint"):
        Checkpoint.load_objects(parts, state)
        for name in (*modules, OPTIMIZER, PRECISION, SCHEDULE):
            if name in parts:
                check_restored(name, state[name], parts[name])
        for name in both:
            saved_state = saved_kept[name]
            if not isinstance(run.kept[name], nn.Module | Optimizer):  # these two copy to their own devices
                saved_state = on_devices(saved_state, counterparts, f"{KEPT}.{name}")
            try:
                Checkpoint.load_objects({name: kept[name]}, {name: saved_state})
            except Exception as error:
                raise ConfigError(
                    f"run.keep({name!r}, ...): {type(error).__name__} while its state was loaded: {error}; its "
                    "load_state_dict must take what its state_dict returned when the checkpoint was saved"
                ) from error
            check_restored(f"{KEPT}.{name}", saved_state, kept[name])
    run.evaluated.show(run.trainer.state)


def on_devices(state: Any, counterparts: Counterparts, path: str) -> Any:
    """Return a loaded state with each tensor on the device of its counterpart in the present run."""
    if hasattr(state, "shape") and hasattr(state, "to"):
        present = counterparts.of(path, tuple(state.shape))
        return state if present is None else state.to(present.device)
    if isinstance(state, Mapping):
        moved = {key: on_devices(value, counterparts, f"{path}.{key}") for key, value in state.items()}
        return moved if type(state) is dict else type(state)(moved)  # type: ignore[call-arg]
    if isinstance(state, list | tuple):
        return type(state)([on_devices(value, counterparts, f"{path}.{index}") for index, value in enumerate(state)])
    return state


def with_present_length(run: Run, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trainer's saved state with the length that the config has now: a resumed run may have another."""
    same = {key: value for key, value in trainer.items() if key not in ("max_epochs", "max_iters", "epoch_length")}
    return {**same, **run.maximum, "epoch_length": run.epoch_length}


def with_user_keys(run: Run, trainer: dict[str, Any], console: Console) -> dict[str, Any]:
    """Return the trainer's saved state with present values for the user keys that the checkpoint lacks."""
    missing = [key for key in run.trainer.state_dict_user_keys if key not in trainer]
    for key in missing:
        warn(console, f"the checkpoint holds no state.{key}, which is one of state_dict_user_keys: it begins anew")
    return {**trainer, **{key: getattr(run.trainer.state, key, None) for key in missing}}


def warn_of_kernels(run: Run, saved: Mapping[str, Any], console: Console) -> bool:
    """Warn if ranks compute with different kernels, or with others than the checkpoint's run: bits may differ then.

    Return whether all kernels are the same.
    """
    by_rank = run.backend.all_gather(run.kernels)
    kinds = sorted({*by_rank, str(saved.get("kernels", by_rank[0]))})
    if len(kinds) > 1:
        warn(
            console,
            f"the same bits are not promised: expected one kind of kernels for a run, got {'; '.join(kinds)}",
        )
    return len(kinds) == 1


def catch_up_data(run: Run, step: int, console: Console) -> None:
    """Move a stream to the run's position by reading, and the trainer to the epoch of the training data."""
    loader = run.loader
    if isinstance(loader, StreamLoader) and step < run.total_steps:
        with dropping(console, line_every_s=run.config.log.every_s) as show:
            loader.catch_up(show)
    run.trainer.state.epoch = loader.epoch
