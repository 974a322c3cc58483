"""The way of a run: assemble, restore, attach, train, result.

The way of a batch: `SlotLoader` (data/) gives this rank's microbatches of a step to `Engine.run` (engine/), which calls
the step body (engine/supervised.py). The step body runs `model(x)` once for each slot, while `SlotGradients`
(parallel/) sums the gradients in the order of the run's tree; then the optimizer steps. After the step, `StepEnd`
(handlers/) fetches losses, validates and saves.
"""

import gc
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console

from disttrain.backend import Backend, make_deterministic, refused_operations_named, set_tf32
from disttrain.config import Config
from disttrain.data import SlotLoader
from disttrain.engine import Events
from disttrain.errors import NonFiniteError
from disttrain.evidence import Ledger, tensor_hashes
from disttrain.handlers.compilations import Compilations
from disttrain.handlers.curves import Curves
from disttrain.handlers.losses import LossLog
from disttrain.handlers.posts import ProgressPosts
from disttrain.handlers.preemption import Preemption
from disttrain.handlers.progress import ProgressDisplay, warn
from disttrain.handlers.step_end import StepEnd
from disttrain.handlers.stragglers import Stragglers
from disttrain.handlers.watchdog import Watchdog
from disttrain.pod import progress_server
from disttrain.run import checkpoint_places
from disttrain.run.assemble import assemble
from disttrain.run.beginning import initial_weights, note_beginning
from disttrain.run.directory import RunDirectory
from disttrain.run.handler_state import unkept_objects
from disttrain.run.memory_shortage import check_memory, told_of_memory, told_of_memory_while_building
from disttrain.run.monitors import check_monitors
from disttrain.run.opening import lock_directory, open_directory
from disttrain.run.outcome import outcome
from disttrain.run.reporter import Reporter
from disttrain.run.resume import check_state, restore
from disttrain.run.rollback import Attempts, go_back
from disttrain.run.saving import Saving
from disttrain.run.state import Run
from disttrain.run.validation import Validation, warn_of_mode


def train(
    config: Config,
    backend: Backend,
    directory: RunDirectory,
    console: Console,
    preemption: Preemption,
    *,
    fresh: bool = False,
) -> dict[str, Any]:
    """Train `config` in `directory` from its newest checkpoint to its end; return the content of result.json.

    `config.num_slots` is a number. With `fresh`, an existing run directory is renamed after everything has been built.
    *Errors*: Interrupted if `preemption` receives a signal before the first step.
    """
    with backend.agree("choosing deterministic kernels"):
        make_deterministic(config.cpu_threads, strict=config.deterministic)
        set_tf32(config.tf32)
    if not config.deterministic:
        warn(console, "deterministic=false: the same bits are not promised")
    attempts = Attempts()
    with refused_operations_named():
        while (result := attempt(config, backend, directory, console, preemption, attempts, fresh=fresh)) is None:
            fresh = False
            gc.collect()  # the parts of the last attempt hold each other, and the device's memory
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
    """Train from the newest checkpoint on; return None if the run has to go back to it, without a bad step."""
    with ExitStack() as stack:
        lock_directory(directory, backend, stack)
        initial = initial_weights(config, directory, backend, fresh=fresh)
        with told_of_memory_while_building(config, backend):
            run = assemble(config, backend, directory, attempts.left_out, initial)
        stack.callback(run.close)
        check_state(run)
        check_memory(run, console)
        if fresh:
            checkpoint_places.refuse_fresh(config, directory, backend)
        open_directory(directory, backend, console, fresh=fresh, stack=stack)
        for note in run.loader.notes:
            console.print(note, soft_wrap=True)
        warn_of_unkept(run, console)
        run.freezing.say_what_is_left_out(partial(warn, console))
        step = restore(run, console)
        if step == 0 and attempts.began is None:
            note_beginning(run, console)
        warn_of_mode(run, console)
        check_monitors(run)
        run.training = True
        services = attach(run, preemption, console, step, stack)
        end, saver = services.step_end, services.saving.saver
        attempts.begin(step)
        preemption.begin(backend, save_every_s=config.checkpoint.every_s)
        try:
            is_over = run.terminated == run.length or run.stopped is not None
            goes_on = step < run.total_steps and not is_over
            if run.evaluation_due and goes_on:
                run.trainer.add_event_handler(Events.STARTED, end.catch_up)  # after all others, which prepare for it
            elif run.evaluation_due:
                run.trainer.fire_event(Events.STARTED)
            if goes_on:
                with told_of_memory(run):
                    run.trainer.run(run.loader, **run.maximum, epoch_length=run.epoch_length)
            if not end.interrupted:
                run.note_end()
                with told_of_memory(run):
                    end.finish(run.trainer, anew=run.terminated is not None and not is_over)
        except NonFiniteError as error:
            if config.on_nan != "rollback":
                raise
            preemption.forget()
            saver.settle()  # the newest checkpoint may still be under way
            go_back(run, error, end.saved_at, console)
            return None
        saver.settle()  # the last checkpoint is complete before anything says so
        newest = backend.broadcast(services.reporter.newest())
        result = outcome(run, end, attempts) | {"train": newest} | services.compilations.report()
        with backend.agree("writing the result"):
            if backend.rank == 0:
                directory.finish(result)
        return result


def warn_of_unkept(run: Run, console: Console) -> None:
    """Warn about objects with a state that handlers hold and no checkpoint does.

    On every rank, though one alone prints: an object's state_dict may call the other ranks.
    """
    for path, unkept in unkept_objects(run.attached, run).items():
        warn(
            console,
            f"{path} ({type(unkept).__name__}) has a state that no checkpoint holds: a resumed run begins with a new "
            "one. If it changes during the run, save it by run.keep(NAME, OBJECT) in the handler (docs/handlers.md)",
        )


@dataclass(frozen=True)
class Services:
    """The attached parts that a run still calls at its end."""

    step_end: StepEnd
    saving: Saving
    compilations: Compilations
    reporter: Reporter


def attach(run: Run, preemption: Preemption, console: Console, step: int, stack: ExitStack) -> Services:
    """Build and attach everything that watches, logs, validates, saves and stops the run, which begins after `step`."""
    config, backend = run.config, run.backend
    watchdog = stack.enter_context(watchdog_of(run))
    display, posts = (None, None) if backend.rank else shown_by_rank_0(run, console)
    with backend.agree("opening the ledger and the curves"):
        ledger = ledger_of(run, step)
        stack.callback(ledger.close)
        curves = None
        if backend.rank == 0:
            curves = Curves(run.directory.metrics, step, tensorboard=config.log.tensorboard)
        reporter = Reporter(ledger, curves, display, posts)
        stack.callback(reporter.close)
    if run.audited is not None:
        hashes = None if config.strategy == "fsdp" else lambda: tensor_hashes(run.state_tensors(), run.layout.whole)
        run.audited.begins(run.directory, hashes, reporter.warn)
    stragglers = stragglers_of(run, reporter)
    losses = LossLog(
        backend,
        run.optimizer,
        samples_per_step=config.global_batch_size,
        update=run.updates.take,
        weights=lambda: run.weights,
        values=run.slot_results.take,
        metrics=run.slot_results.metrics,
        bad_steps=run.bad_steps,
        fetched=reporter.fetched,
        passenger=stragglers,
        names_vary=bool(config.updates),
    )
    saving = stack.enter_context(Saving(run, reporter.sync, console))
    compilations = Compilations(backend)
    validation = None
    if (evaluation := run.evaluation) is not None:
        validation = Validation(run, evaluation, preemption, watchdog, compilations, reporter)
    step_end = StepEnd(
        losses,
        preemption,
        save=saving,
        validate=validation,
        total_steps=run.total_steps,
        log_every_steps=config.log.every_steps,
        save_every_steps=config.checkpoint.every_steps,
        validate_every_steps=config.validate.every_steps,
        anchor_every_steps=config.checkpoint.anchor_every_steps,
        pass_ends=None if run.epoch_length else lambda: run.loader.step == 0,
        best=run.best,
        early_stop=run.early_stop,
    )
    step_end.resumed_at(step, run.evaluated.results if run.evaluated.step == step else None)
    # Handlers of an event run in this order, after those of the config.
    order = (
        watchdog,  # before anything that may hang
        display,
        posts,
        stragglers,  # measures the step before anything waits for other ranks
        run.ema,  # averages the weights before the ledger hashes the average
        saving,  # looks after a save that is under way
        losses,  # collects the step's losses, which the ledger and StepEnd need
        ledger,  # hashes the state before it is saved
        step_end,  # fetches, validates, saves, stops
        compilations,  # counts after everything else that computes
    )
    for part in order:
        if part is not None:
            part.attach(run.trainer)
    return Services(step_end, saving, compilations, reporter)


def shown_by_rank_0(run: Run, console: Console) -> tuple[ProgressDisplay, ProgressPosts | None]:
    """Return the progress display, and what posts the progress if the pod's operator asks for it."""
    config = run.config
    display = ProgressDisplay(
        console, total_steps=run.total_steps, max_epochs=config.max_epochs, line_every_s=config.log.every_s
    )
    server = progress_server()
    return display, None if server is None else ProgressPosts(server, run.total_steps, partial(warn, console))


def watchdog_of(run: Run) -> Watchdog:
    """Return the watchdog of this rank, which is told how far the gradients have met."""
    progress = run.gradients.progress
    return Watchdog(
        run.backend,
        run.config.timeout_s,
        run.directory.logs,
        meeting=None if progress is None else progress.__str__,
    )


def ledger_of(run: Run, step: int) -> Ledger:
    """Return the ledger of the run, which continues after `step`."""
    loader = run.loader
    return Ledger(
        run.directory.ledger_jsonl,
        step or -1,  # a new run does not keep the line of step 0 that an unsaved run may have left
        backend=run.backend,
        every_steps=run.config.ledger.every_steps,
        state=run.state_tensors,
        whole=run.layout.whole,
        # A stream's samples have no indices; the hashes of the slots' microbatches tell them apart.
        order=loader.sampler.samples if isinstance(loader, SlotLoader) else None,
    )


def stragglers_of(run: Run, reporter: Reporter) -> Stragglers | None:
    """Return the straggler detector; None on one rank."""
    if run.backend.world_size == 1:
        return None
    progress = run.gradients.progress
    waited_s = None
    if progress is not None and progress.waited_s is not None:
        waited_s = lambda: progress.waited_s or 0.0  # noqa: E731
    return Stragglers(
        run.backend.rank,
        len(run.slots.mine),
        loading_s=lambda: run.loader.loading_s,
        waited_s=waited_s,
        window_s=run.config.log.every_s,
        tell=reporter.warn,
    )
