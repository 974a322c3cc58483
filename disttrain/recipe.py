"""A Config and a Backend become a run: where all parts meet, none of whose insides are known here.

The way of a batch: `SlotLoader` (data/) hands this rank's microbatches of a step to `Engine.run` (engine/),
which calls the step body (engine/supervised.py); that runs `model(x)` once for each slot, while
`SlotGradients` (parallel/) merges the gradients in the order of the run's tree; the optimizer steps; when the
step is over, `StepEnd` (handlers/) fetches losses, validates and saves.
"""

import gc
import platform
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console

from disttrain import kept
from disttrain.assemble import assemble
from disttrain.backend import Backend, make_deterministic, refused_operations_named, set_tf32
from disttrain.checkpoint import AsynchronousSaver, DirectorySaver, checkpoint_name, params_sha256
from disttrain.config import Config
from disttrain.data import SlotLoader
from disttrain.engine import Engine, Events
from disttrain.errors import DisttrainError, NonFiniteError
from disttrain.handlers.compilations import Compilations
from disttrain.handlers.curves import Curves
from disttrain.handlers.losses import LossLog, Pace
from disttrain.handlers.preemption import Preemption
from disttrain.handlers.progress import ProgressDisplay
from disttrain.handlers.rank_log import RankLog
from disttrain.handlers.step_end import StepEnd
from disttrain.observe import Ledger, Stragglers, Watchdog, state_tensors
from disttrain.resume import restore
from disttrain.rollback import Attempts, go_back
from disttrain.run import Run
from disttrain.run_directory import RunDirectory
from disttrain.saving import Saving
from disttrain.version import __version__


def run(
    config: Config,
    backend: Backend,
    directory: RunDirectory,
    console: Console,
    preemption: Preemption,
    *,
    fresh: bool = False,
) -> dict[str, Any]:
    """Train `config` in `directory` from its newest checkpoint to its end; return what result.json holds.

    `config.num_slots` is a number. With `fresh` a run that is there makes room once everything is built.
    *Errors*: Interrupted where `preemption` hears a signal before the first step.
    """
    with backend.agree("choosing deterministic kernels"):
        make_deterministic(config.cpu_threads, strict=config.deterministic)
        set_tf32(config.tf32)
    if not config.deterministic:
        console.print("WARNING: deterministic=false: the same bits are not promised", style="bold yellow")
    attempts = Attempts()
    with refused_operations_named():
        while (result := attempt(config, backend, directory, console, preemption, attempts, fresh=fresh)) is None:
            fresh = False
            gc.collect()  # the parts of the attempt before hold each other, and the device's memory
    return result


def attempt(
    config: Config,
    backend: Backend,
    directory: RunDirectory,
    console: Console,
    preemption: Preemption,
    attempts: Attempts,
    *,
    fresh: bool,
) -> dict[str, Any] | None:
    """Train from the newest checkpoint on; None where the run has to go back to it, without a bad step."""
    with ExitStack() as stack:
        made = assemble(config, backend, directory)
        made.left_out = attempts.left_out
        stack.callback(made.close)
        if fresh:
            kept.refuse_fresh(config, directory, backend)
        take(directory, backend, console, fresh=fresh, stack=stack)
        for note in made.loader.notes:
            console.print(note, soft_wrap=True)
        step = restore(made, console)
        watch(made, stack)  # not before: reading a stream up to where the run stands may take long, and is progress
        compilations = Compilations(backend)
        end, saver = observe(made, preemption, console, step, stack, compilations)
        compilations.attach(made.trainer)
        attempts.begin(step)
        preemption.begin(backend, save_every_s=config.checkpoint.every_s)
        try:
            if made.evaluation_due:
                end.catch_up(made.trainer)
            if step < made.total_steps and not end.interrupted:
                made.trainer.run(made.loader, **made.maximum, epoch_length=made.epoch_length)
            if not end.interrupted:
                end.finish(made.trainer)
        except NonFiniteError as error:
            if config.on_nan != "rollback":
                raise
            preemption.forget()
            saver.settle()  # the newest checkpoint may be under way still
            go_back(made, error, end.saved_at, console)
            return None
        saver.settle()  # the last checkpoint is there before anything says so
        result = outcome(made, end, attempts) | compilations.report()
        with backend.agree("writing the result"):
            if backend.rank == 0:
                directory.finish(result)
        return result


def watch(made: Run, stack: ExitStack) -> None:
    """From here on stop a rank that makes no progress, in a step, in loading or in an evaluation."""
    meeting = None if made.meeting is None else made.meeting.__str__
    watchdog = stack.enter_context(
        Watchdog(made.backend, made.config.timeout_s, made.directory.logs, meeting=meeting),
    )
    watchdog.attach(made.trainer)
    if (evaluation := made.evaluation) is not None:
        batches = evaluation.batches
        evaluation.batches = lambda: watchdog.watched(batches(), "evaluating")


def take(directory: RunDirectory, backend: Backend, console: Console, *, fresh: bool, stack: ExitStack) -> None:
    """Open the run directory on rank 0, and on every rank its log."""
    with backend.agree("opening the run directory"):
        if backend.rank == 0:
            stack.callback(directory.close)
            old = directory.open(fresh=fresh)
            if old is not None:
                console.print(f"the old run is kept as {old}", soft_wrap=True)
    with backend.agree("opening the logs"):
        stack.enter_context(RankLog(directory.logs, backend.rank))


def observe(
    made: Run, preemption: Preemption, console: Console, step: int, stack: ExitStack, compilations: Compilations
) -> tuple[StepEnd, DirectorySaver]:
    """Attach what logs, shows, validates, saves and stops; return what is still asked to do something at the end."""
    config, backend, trainer = made.config, made.backend, made.trainer
    display = ProgressDisplay(
        console, total_steps=made.total_steps, max_epochs=config.max_epochs, line_every_s=config.log.every_s
    )
    stack.callback(display.close)
    curves = None
    with backend.agree("opening the ledger and the curves"):
        ledger = ledger_of(made, step)
        stack.callback(ledger.close)
        if backend.rank == 0:
            curves = Curves(made.directory.metrics, step, tensorboard=config.log.tensorboard)
            stack.callback(curves.close)
            display.attach(trainer)

    def fetched(lines: list[dict[str, Any]], pace: Pace) -> None:
        ledger.fetched(lines)
        if curves is not None:
            curves.trained(lines, pace)
            display.pace(pace)

    def validate(engine: Engine) -> dict[str, Any] | None:
        assert made.evaluation is not None
        with compilations.apart():
            values = made.evaluation.run(preemption.asked)
        made.evaluation_due = values is None
        if values is not None and curves is not None:
            curves.validated(engine.state.iteration, made.epochs_begun, values)
            display.validated(engine.state.iteration, made.epochs_begun, values)
        return values

    slow = stragglers_of(made, lambda text: display.line(f"WARNING: {text}"))
    if slow is not None:
        slow.attach(trainer)
    losses = LossLog(
        backend,
        made.optimizer,
        samples_per_step=config.global_batch_size,
        update=made.take_update,
        bad_steps=made.bad_steps,
        fetched=fetched,
        companion=slow,
    )

    def sync() -> None:
        ledger.sync()
        if curves is not None:
            curves.sync()

    saving = Saving(made, sync, console)
    if isinstance(saving.saver, AsynchronousSaver):
        stack.enter_context(saving.saver)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, saving.saver.poll)
    end = StepEnd(
        losses,
        preemption,
        save=saving,
        validate=None if made.evaluation is None else validate,
        total_steps=made.total_steps,
        log_every_steps=config.log.every_steps,
        save_every_steps=config.checkpoint.every_steps,
        validate_every_steps=config.validate.every_steps,
        pass_ends=None if made.epoch_length else lambda: made.loader.step == 0,
        best=made.best,
    )
    end.resumed_at(step)
    losses.attach(trainer)
    ledger.attach(trainer)
    end.attach(trainer)
    return end, saving.saver


def best_found(made: Run, saved_at: int) -> dict[str, Any]:
    """Return what result.json says of the best evaluation; nothing where none was asked for, found, or saved."""
    found = None if made.best is None else made.best.found
    if found is None or found.step > saved_at:
        return {}
    return {"best": {**found._asdict(), "checkpoint": checkpoint_name(found.step)}}


def stragglers_of(made: Run, tell: Callable[[str], object]) -> Stragglers | None:
    """Return what finds ranks that hold others up; None where there are no others."""
    if made.backend.world_size == 1:
        return None
    meeting = made.meeting
    knows = meeting is not None and meeting.waited_s is not None
    return Stragglers(
        made.backend.rank,
        len(made.slots.mine),
        loading_s=lambda: made.loader.loading_s,
        waited_s=(lambda: (meeting and meeting.waited_s) or 0.0) if knows else None,
        window_s=made.config.log.every_s,
        tell=tell,
    )


def ledger_of(made: Run, step: int) -> Ledger:
    """Return the ledger of the run, which goes on after `step`."""
    loader = made.loader
    return Ledger(
        made.directory.ledger_jsonl,
        step or -1,  # a run that begins does not go on with the line of step 0 that an unsaved one may have left
        backend=made.backend,
        every_steps=made.config.ledger.every_steps,
        state=lambda: state_tensors(made.model, made.optimizer),
        whole=made.layout.whole,
        # A stream's samples have no indices; the hashes of what the slots hold tell them apart.
        order=loader.sampler.samples if isinstance(loader, SlotLoader) else None,
    )


def outcome(made: Run, end: StepEnd, attempts: Attempts) -> dict[str, Any]:
    """Check that all ranks hold the same weights, and return what result.json holds."""
    backend, step = made.backend, made.trainer.state.iteration
    digests = backend.all_gather(params_sha256(made.model, made.layout.whole))
    if len(set(digests)) > 1:
        listing = ", ".join(f"rank {rank}: {digest[:12]}" for rank, digest in enumerate(digests))
        raise DisttrainError(f"the ranks ended with different weights ({listing}), expected the same on each")
    trained, wall_s = (step - attempts.first_step) * made.config.global_batch_size, attempts.wall_s
    return {
        "status": "interrupted" if end.interrupted else "completed",
        "step": step,
        "epoch": made.epochs_begun,
        "metrics": end.metrics,
        "params_sha256": digests[0],
        "world_size": backend.world_size,
        "num_slots": made.slots.num_slots,
        "checkpoint": checkpoint_name(end.saved_at),
        **best_found(made, end.saved_at),
        "skipped_steps": made.skipped_steps,
        "rollbacks": len(made.left_out),
        "samples_per_second": round(trained / max(wall_s, 1e-9), 1),
        "wall_s": round(wall_s, 3),
        "disttrain": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(backend.device),
        "precision": made.precision.name,
    }
