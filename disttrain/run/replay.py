"""Computes one step of a run again, in this process alone, whatever ranks the run had.

*Contract*: the run is assembled as for a resume, takes the state of a checkpoint before the step (or begins anew), and
trains up to the step. Each step on the way is proven: its line has the bits of the run's ledger. Everything that a
handler or the run itself writes goes into a directory of the replay's own (`shadow`); the run's directory is only
read, and not locked, so the run may be under way. Evaluations are done where something follows their results.

A step that the run left out after a rollback is computed as it was before, and is not proven: the ledger has no results
of it.

*Errors*: Mismatch for a step that differs from the ledger, with the reasons that are known. Those of a resume.

*Cost*: the steps from the checkpoint on, on one process; and for each step a hash of its batch and of the whole state.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from rich.console import Console

from disttrain.backend import Backend, make_deterministic, refused_operations_named, set_tf32
from disttrain.checkpoint import load_from
from disttrain.config import CheckpointConfig, Config, LedgerConfig, LogConfig, replace
from disttrain.engine import Engine, Events
from disttrain.errors import CheckpointError, ConfigError, DamagedError
from disttrain.evidence import Ledger, first_difference, tensor_hashes
from disttrain.evidence.ledger import Line, hex_float
from disttrain.handlers.compilations import Compilations
from disttrain.handlers.losses import LossLog
from disttrain.handlers.preemption import Preemption
from disttrain.handlers.progress import warn
from disttrain.handlers.step_end import StepEnd
from disttrain.run.assemble import assemble
from disttrain.run.checkpoint_places import accept
from disttrain.run.directory import RunDirectory
from disttrain.run.handler_state import unkept_objects
from disttrain.run.mismatch import Mismatch
from disttrain.run.replay_start import Start, weights_for
from disttrain.run.replayed_slots import ReplayedSlot, SlotDone, SlotWatcher
from disttrain.run.reporter import Reporter
from disttrain.run.resume import restore_from
from disttrain.run.saving import Saving
from disttrain.run.state import Run
from disttrain.run.train import ledger_of, watchdog_of
from disttrain.run.validation import Validation


class Replayed(NamedTuple):
    """A step that was computed again."""

    step: int
    epoch: int
    start: Start
    slots: list[ReplayedSlot]
    line: Line
    """The step's line of the ledger, as it was computed here; empty if a single slot was asked for."""
    left_out: str | None
    """The reason for which the run left the whole step out; None if it did not."""
    num_proven: int
    """The steps, up to this one, that have the bits of the run's ledger."""
    differs: Mismatch | None = None
    """The first step that has not, if the replay goes on there."""


def replay_config(config: Config) -> Config:
    """Return the config with which a run is replayed: the same bits, in this process, without files elsewhere."""
    return replace(
        config,
        num_workers=0,
        train_metrics={},
        checkpoint=CheckpointConfig(
            **{**config.checkpoint.model_dump(), "target": None, "asynchronous": False, "every_s": 0.0}
        ),
        ledger=LedgerConfig(every_steps=1),
        log=LogConfig(**{**config.log.model_dump(), "tensorboard": False}),
    )


class Replay:
    """Computes steps of the run in `directory` again, with `config` (of `replay_config`).

    `lines` are the run's ledger by step. `reasons` are known causes of other bits, for the message of a Mismatch. With
    `saves` the state after the step is saved in `shadow`, as a run that is stopped there saves it. Without `proves`
    it goes on after a step that differs from the ledger.
    """

    def __init__(
        self,
        config: Config,
        backend: Backend,
        directory: RunDirectory,
        shadow: RunDirectory,
        lines: Mapping[int, Line],
        console: Console,
        *,
        reasons: Sequence[str] = (),
        saves: bool = False,
        proves: bool = True,
    ) -> None:
        self._config = config
        self._backend = backend
        self._directory = directory
        self._shadow = shadow
        self._lines = lines
        self._console = console
        self._reasons = list(reasons)
        self._saves = saves
        self._proves = proves
        self._num_proven = 0
        self._differs: Mismatch | None = None

    def run(self, starts: Sequence[Start], watcher: SlotWatcher) -> Replayed:
        """Compute the watcher's step from the first of `starts` that can be loaded."""
        with self._backend.agree("choosing deterministic kernels"):
            make_deterministic(self._config.cpu_threads, strict=self._config.deterministic)
            set_tf32(self._config.tf32)
        with refused_operations_named():
            for start in starts:
                try:
                    return self._run_from(start, watcher)
                except CheckpointError as error:
                    is_gone = start.store is not None and start.name not in start.store.committed()
                    if not (is_gone or isinstance(error, DamagedError)):  # a run that is under way removes its oldest
                        raise
                    warn(self._console, f"{start} cannot be used: {error}")
        raise ConfigError(f"step {watcher.step} cannot be replayed: there is no good checkpoint to begin with")

    def _run_from(self, start: Start, watcher: SlotWatcher) -> Replayed:
        step = watcher.step
        left_out = {at: str(line.get("left_out", "")) for at, line in self._lines.items() if self._is_left_out(at)}
        reason = left_out.pop(step, None)
        with ExitStack() as stack:
            initial = weights_for(self._config, self._directory, start)
            run = assemble(self._config, self._backend, self._shadow, left_out, initial)
            stack.callback(run.close)
            cuts = run.layout.cuts(run.parts, run.optimizer, run.kept)
            found = None
            if start.store is not None:
                found = load_from(start.store, start.name, self._backend, cuts, partial(accept, run))
            at = restore_from(run, found, self._console)
            then = None if found is None else found.manifest.position.get("kernels")
            self._reasons += [] if run.taken is None else run.taken.notes
            if then not in (None, run.kernels):
                self._reasons.append(f"kernels: {then} then, {run.kernels} now")
            for path in unkept_objects(run.attached, run) if at else ():
                self._reasons.append(f"{path} has a state that no checkpoint holds (run.keep)")
            for each in [each for each in run.left_out if each >= step]:  # a checkpoint may know of this step too
                run.left_out.pop(each)
            steps = f"step {step}" if step == at + 1 else f"steps {at + 1} to {step}"
            self._console.print(f"computing {steps} from {start}", soft_wrap=True)
            run.training = True
            self._num_proven, self._differs = 0, None
            watcher.attach(run)
            ledger = self._attach(run, start, at, step, stack)
            try:
                run.trainer.run(run.loader, **run.maximum, epoch_length=run.epoch_length)
            except SlotDone:
                self._prove_slot(watcher.slots[0], step, start)
                return self._replayed(run, watcher, start, {}, reason)
            if run.trainer.state.iteration < step:
                raise ConfigError(
                    f"the run's own code ended it after step {run.trainer.state.iteration}: expected step {step}; "
                    "a handler calls trainer.terminate()"
                )
            return self._replayed(run, watcher, start, dict(ledger.newest), reason)

    def _replayed(self, run: Run, watcher: SlotWatcher, start: Start, line: Line, reason: str | None) -> Replayed:
        epoch, proof = run.trainer.state.epoch, (self._num_proven, self._differs)
        return Replayed(watcher.step, epoch, start, watcher.slots, line, reason, *proof)

    def _is_left_out(self, step: int) -> bool:
        """Return whether the run left out the whole step, after a rollback."""
        return step > 0 and self._lines[step]["loss"] is None

    def _attach(self, run: Run, start: Start, at: int, step: int, stack: ExitStack) -> Ledger:
        """Attach what a run attaches, in its order, but for what watches, shows and saves it."""
        for folder in (self._shadow.checkpoints, self._shadow.metrics, self._shadow.logs):
            folder.mkdir(parents=True, exist_ok=True)  # as a handler finds them in a run
        ledger = ledger_of(run, at)
        stack.callback(ledger.close)
        reporter = Reporter(ledger, None, None)
        losses = LossLog(
            run.backend,
            run.optimizer,
            samples_per_step=run.config.global_batch_size,
            update=run.updates.take,
            weights=lambda: run.weights,
            values=run.slot_results.take,
            fetched=reporter.fetched,
            names_vary=bool(run.config.updates),
        )
        preemption = Preemption(run.backend)  # not entered: signals do what they do in any program
        validation = self._validation(run, preemption, reporter, step)
        saving = None
        if self._saves:
            saving = stack.enter_context(Saving(run, ledger.sync, self._console))
        end = StepEnd(
            losses,
            preemption,
            save=lambda engine, _: saving is None or engine.state.iteration != step or saving(engine),
            validate=validation,
            total_steps=run.total_steps,
            log_every_steps=run.config.log.every_steps,
            save_every_steps=run.config.checkpoint.every_steps,
            validate_every_steps=run.config.validate.every_steps,
            pass_ends=None if run.epoch_length else lambda: run.loader.step == 0,
            best=run.best,
            early_stop=run.early_stop,
        )
        end.resumed_at(at, run.evaluated.results if run.evaluated.step == at else None)

        def begin() -> None:
            if at == 0:
                self._prove(ledger.newest, start)
            elif "state" in (line := self._lines.get(at, {})):
                self._prove({**line, "state": tensor_hashes(run.state_tensors(), run.layout.whole)}, start)
                self._num_proven = 0

        def prove(engine: Engine) -> None:
            losses.fetch(engine)
            self._prove(ledger.newest, start)
            if engine.state.iteration == step and saving is None:
                engine.interrupt()

        def stop_and_save(engine: Engine) -> None:
            if engine.state.iteration == step:
                preemption.stop()  # the state is saved as that of a run that is stopped here

        for part in (run.ema, losses, ledger):
            if part is not None:
                part.attach(run.trainer)
        run.trainer.add_event_handler(Events.STARTED, begin)
        run.trainer.add_event_handler(Events.ITERATION_COMPLETED, prove)
        if saving is not None:
            run.trainer.add_event_handler(Events.ITERATION_STARTED, stop_and_save)
        end.attach(run.trainer)
        if run.evaluation_due and validation is not None:
            run.trainer.add_event_handler(Events.STARTED, end.catch_up)
        return ledger

    def _validation(
        self, run: Run, preemption: Preemption, reporter: Reporter, step: int
    ) -> Callable[[Engine], dict[str, Any] | None] | None:
        """Return the evaluation after each step before `step`; None if nothing can follow its results."""
        if run.evaluation is None or not run.evaluated.is_followed:
            return None
        validation = Validation(run, run.evaluation, preemption, watchdog_of(run), Compilations(run.backend), reporter)
        return lambda engine: validation(engine) if self._saves or engine.state.iteration < step else None

    def _prove_slot(self, slot: ReplayedSlot, step: int, start: Start) -> None:
        """Hold a slot's loss against the run's, if its ledger has the losses of the slots."""
        expected = self._lines[step]
        if "slots" not in expected or slot.loss is None or slot.update is not None:
            return  # with several updates the ledger has the sum of their losses
        losses = list(expected["slots"]["loss"])
        losses[slot.slot] = hex_float(slot.loss)
        self._compare(expected, {**expected, "slots": {**expected["slots"], "loss": losses}}, start)

    def _prove(self, line: Line, start: Start) -> None:
        """Hold a step's line against the run's; Mismatch if it has other bits."""
        step = line["step"]
        if step not in self._lines:
            return
        expected = self._lines[step]
        if self._is_left_out(step) and line["loss"] is not None:  # it is computed all the same: its samples are known
            expected = {**line, **({"order": expected["order"]} if "order" in expected else {})}
        self._compare(expected, line, start)

    def _compare(self, expected: Line, line: Line, start: Start) -> None:
        step = line["step"]
        difference = first_difference({step: expected}, {step: line})
        if difference is None:
            self._num_proven += step > 0 and self._differs is None
        elif self._proves:
            raise Mismatch(difference, start, self._reasons)
        elif self._differs is None:
            self._differs = Mismatch(difference, start, self._reasons)
            warn(self._console, f"{type(self._differs).__name__}: {self._differs}")
