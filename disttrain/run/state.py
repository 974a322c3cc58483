"""The parts of an assembled run, its position, and the further objects that its handlers keep."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from disttrain.backend import Backend, kernels_of
from disttrain.checkpoint import CheckpointInfo
from disttrain.config import Config, binding_fields, config_hash, describe
from disttrain.data import SlotLoader, StreamLoader
from disttrain.engine import Engine
from disttrain.engine.supervised import StepFunction
from disttrain.errors import ConfigError
from disttrain.evidence import state_tensors
from disttrain.handlers.bad_steps import BadSteps
from disttrain.handlers.best import Best
from disttrain.handlers.early_stop import EarlyStop
from disttrain.parallel import GradientsOverSlots, Layout, Slots
from disttrain.parallel.optimizers import Optimizers
from disttrain.precision import Precision
from disttrain.run.audit import AuditedSteps
from disttrain.run.directory import RunDirectory
from disttrain.run.ema import Ema
from disttrain.run.evaluated import Evaluated
from disttrain.run.evaluation import Evaluation
from disttrain.run.freezing import Freezing
from disttrain.run.frozen_weights import FrozenWeights
from disttrain.run.initial_weights import Taken, modules_of
from disttrain.run.length import run_length, total_steps
from disttrain.run.module_settings import ModuleSettings
from disttrain.run.slot_results import SlotResults
from disttrain.run.updates import Updates, counters_in
from disttrain.run.validation_sets import ValidationSets
from disttrain.run.weight_source import Begin, begin_of

T = TypeVar("T")


@dataclass(kw_only=True)
class Run:
    """An assembled run: the second argument of a config's handlers, beside the trainer."""

    config: Config
    backend: Backend
    directory: RunDirectory
    slots: Slots
    step_function: StepFunction
    """The model, and the loss or the forward that calls it, as the step calls them."""
    layout: Layout
    """How the model lies over ranks and devices."""
    optimizer: Any
    """The optimizer; with `updates` those of all of them as one (`parallel/optimizers.py`)."""
    schedule: Any
    """The learning rate's schedule; None without one."""
    precision: Precision
    gradients: GradientsOverSlots
    """How the gradients of slots and ranks meet."""
    updates: Updates
    """Gradient norm, clipping, and updates that are left out."""
    slot_results: SlotResults
    """What the forward returned beside the losses, and the metrics of the training data."""
    freezing: Freezing
    """The parameters that are trained, and the groups of the optimizer; handlers may change both."""
    loader: SlotLoader | StreamLoader
    trainer: Engine
    evaluation: Evaluation | ValidationSets | None
    """The validation data and its metrics; None without validation data."""
    best: Best | None
    """The best evaluation so far; None without checkpoint.monitor."""
    ema: Ema | None
    """The moving average of the weights; None without ema.decay."""
    audited: AuditedSteps | None
    """The audit of some steps; None without audit.every_steps."""
    early_stop: EarlyStop | None
    """Whether the run ends early; None without early_stop.monitor."""
    bad_steps: BadSteps | None
    """Finds bad losses; None with on_nan="skip"."""
    data: dict[str, Any]
    """Length and fingerprint of the training data: a run resumes with the data it began with."""
    valid_data: Any
    """The validation data: a Dataset, or several by name; None without."""
    taken: Taken | None
    """The weights of `init_from` that this launch has taken; None if it has taken none."""
    attached: list[tuple[str, Any]] = field(default_factory=list)
    """The config's handlers and the functions that they attached to the trainer, by the name of the handler."""
    kept: dict[str, Any] = field(default_factory=dict)
    """Further objects that checkpoints hold, by name; `keep` adds one."""
    samples: dict[str, str] = field(default_factory=dict)
    """Hashes of a few samples, by name: a run resumes with the data it began with."""
    settings: ModuleSettings | None = None
    """What handlers change of the modules beside tensors; set when the run is assembled."""
    begin: Begin | None = None
    """The weights of `init_from` with which the run began; None without."""
    frozen: FrozenWeights | None = None
    """The frozen weights that checkpoints leave out; set when the run is assembled."""
    pretrained: dict[str, Any] = field(default_factory=dict)
    """What checkpoints keep of the models of transformers; empty without one. Set when the run is assembled."""
    evaluated: Evaluated = field(default_factory=Evaluated)
    """The newest whole evaluation."""
    evaluation_due: bool = False
    """True if a signal interrupted this step's evaluation; a resumed run evaluates before its next step."""
    terminated: dict[str, Any] | None = None
    """The `length` that the run had when code of the user's ended it (`trainer.terminate`); None if none has."""
    training: bool = False
    """True once the first step may run: from then on nothing further can be kept."""

    def keep(self, name: str, obj: T) -> T:
        """Save the state of `obj` in every checkpoint, restore it on resume, hash it into the ledger; return `obj`.

        Call it in a config's handler: `ema = run.keep("ema", Ema(run.model))`. `obj` is anything with `state_dict`
        and `load_state_dict`: an object of your own, a Module, an Optimizer. It is restored after all handlers have
        been called. Its state must be the same on every rank, and of values that a checkpoint can hold: None, bool,
        int, float, str, lists, tuples, dicts and tensors (with strategy="fsdp" also the DTensors of parameters).

        *Errors*: ConfigError for a name that is taken or holds a dot, for an object without these methods, and after
        the run's first step.
        """
        if not name or "." in name:
            raise ConfigError(f"run.keep({name!r}, ...): expected a name without dots, got {name!r}")
        if name in self.kept:
            raise ConfigError(f"run.keep({name!r}, ...): this name is taken; keep each object under a name of its own")
        methods = ("state_dict", "load_state_dict")
        if missing := [method for method in methods if not callable(getattr(obj, method, None))]:
            raise ConfigError(
                f"run.keep({name!r}, ...): expected an object with state_dict and load_state_dict, "
                f"got {type(obj).__name__} without {' and '.join(missing)}"
            )
        if self.training:
            raise ConfigError(f"run.keep({name!r}, ...): expected a call before the first step; call it in the handler")
        self.kept[name] = obj
        return obj

    @property
    def model(self) -> nn.Module:
        """The config's model; the step calls it inside `step_function`."""
        return self.step_function.model

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The modules whose states a checkpoint holds, by name: the model, and a loss or a forward with a state."""
        return modules_of(self.step_function)

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers of the config's `updates` by name; without them the only one, as "optimizer"."""
        return self.optimizer.by_name if isinstance(self.optimizer, Optimizers) else {"optimizer": self.optimizer}

    @property
    def weights(self) -> list[int] | None:
        """The weights of this rank's slots in the newest step; None without the config's `weight`."""
        return self.gradients.weights.mine

    @property
    def grad_norm(self) -> Tensor | None:
        """2-norm of the newest step's gradient before clipping, 0-dimensional, on the device; None if unknown."""
        return self.updates.grad_norm

    @property
    def skipped_steps(self) -> int:
        """Steps over the whole run whose update was left out, by `on_nan` or because scaled gradients overflowed."""
        return self.updates.num_skipped

    @property
    def left_out(self) -> dict[int, str]:
        """Steps, done or still to come, that on_nan="rollback" leaves out whole, and the reason for each."""
        return self.updates.left_out

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return total_steps(self.config, self.data)

    @property
    def epoch_length(self) -> int | None:
        """Steps of an epoch; None for a stream, whose passes end when they end."""
        return len(self.loader) if isinstance(self.loader, SlotLoader) else None

    @property
    def length(self) -> dict[str, Any]:
        """The length that the config asks for: a run that the user's code has ended goes on with another one."""
        return run_length(self.config)

    @property
    def maximum(self) -> dict[str, int]:
        """The end of the run, as `Engine.run` takes it."""
        if self.config.max_epochs is not None and self.epoch_length is not None:
            return {"max_epochs": self.config.max_epochs}
        return {"max_iters": self.total_steps}

    @property
    def kernels(self) -> str:
        """The kernels, and the number of devices that a slot is cut over; they decide bits beside the config."""
        kernels, num_devices = kernels_of(self.backend.device), self.backend.num_devices
        return kernels if num_devices == 1 else f"{kernels}, {num_devices} devices as one ({self.config.strategy})"

    @property
    def epochs_begun(self) -> int:
        """Epochs of which at least one step is done."""
        return self.loader.epoch + (self.loader.step > 0)

    def is_anchor(self, step: int) -> bool:
        """Return whether the checkpoint of a step stays for good (`checkpoint.anchor_every_steps`)."""
        every_steps = self.config.checkpoint.anchor_every_steps
        return every_steps > 0 and step % every_steps == 0

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the whole state by name: parameters, buffers, optimizer state, kept objects, what is frozen."""
        return {**state_tensors(self.parts, self.optimizer, self.kept), **self.freezing.tensors()}

    def close(self) -> None:
        """Stop the loader's workers and release the model."""
        self.loader.close()
        self.gradients.close()

    def position(self) -> dict[str, Any]:
        """Return the position of the run, for a checkpoint's manifest."""
        recent = [] if self.bad_steps is None else list(self.bad_steps.recent)
        left_out = {str(step): reason for step, reason in sorted(self.left_out.items())}
        settings = {} if self.settings is None else self.settings.changed()
        return {
            "epoch": self.loader.epoch,
            "step_in_epoch": self.loader.step,
            "samples_seen": self.trainer.state.iteration * self.config.global_batch_size,
            "skipped_steps": self.skipped_steps,
            "global_batch_size": self.config.global_batch_size,
            "kernels": self.kernels,
            **({"evaluation_due": True} if self.evaluation_due else {}),
            **({"anchor": True} if self.is_anchor(self.trainer.state.iteration) else {}),
            **({"module_settings": settings} if settings else {}),
            **({"left_out": left_out} if left_out else {}),
            **({} if (terminated := self._terminated_now()) is None else {"terminated": terminated}),
            **({"schedule_monitor": self.updates.monitor} if self.updates.follows_values else {}),
            **({"recent_losses": recent} if recent else {}),
            **({} if self.best is None else self.best.position()),
            **({} if self.ema is None else {"ema": {"evaluate": self.config.ema.evaluate}}),
            **({} if self.early_stop is None else self.early_stop.position()),
            **self.freezing.position(),
            **({} if self.begin is None else {"init_from": self.begin._asdict()}),
            **({} if self.frozen is None else self.frozen.position()),
            **self.pretrained,
            **self.data,
            **({"samples": self.samples} if self.samples else {}),
        }

    @property
    def stopped(self) -> str | None:
        """The reason for which the run ends before its last step, by its own rule; None if it goes on."""
        reason = None if self.early_stop is None else self.early_stop.reason
        return None if reason is None else f"early: {reason}"

    def _terminated_now(self) -> dict[str, Any] | None:
        """Return `terminated`, also in the step in which the user's code asks for it."""
        asked = self.trainer.should_terminate and self.trainer.state.iteration < self.total_steps
        by_rule = self.early_stop is not None and self.early_stop.ends_run
        return self.length if asked and not by_rule else self.terminated

    def note_end(self) -> None:
        """Note after the last step whether the user's code has ended the run before its length."""
        if self.trainer.state.iteration >= self.total_steps:
            self.terminated = None
        else:
            self.terminated = self.length if self.stopped is None else self._terminated_now()

    def load_position(self, position: Mapping[str, Any]) -> None:
        """Restore the counters that `position` wrote into a checkpoint; CheckpointError for what no run wrote."""
        skipped, left_out, recent = counters_in(position)
        self.updates.num_skipped = skipped
        self.evaluation_due = position.get("evaluation_due") is True
        self.terminated = position.get("terminated")
        self.begin = begin_of(position.get("init_from"))
        self.updates.follow(position.get("schedule_monitor"), self.config.schedule_monitor)
        self.left_out.update(left_out)
        if self.settings is not None:
            self.settings.load(position.get("module_settings", {}))
        if self.best is not None:
            self.best.load_position(position)
        if self.early_stop is not None:
            self.early_stop.load_position(position)
        if self.bad_steps is not None:
            self.bad_steps.recent.extend(recent)

    def checkpoint_info(self) -> CheckpointInfo:
        """Return the part of a checkpoint's manifest that describes the run."""
        return CheckpointInfo(
            position=self.position(),
            seed=self.config.seed,
            num_slots=self.slots.num_slots,
            config_sha256=config_hash(self.config),
            config=binding_fields(describe(self.config)),
        )
