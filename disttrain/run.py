"""An assembled run: its parts, where it stands, and what a checkpoint says of that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.backend import Backend, kernels_of
from disttrain.checkpoint import About
from disttrain.config import Config, config_hash
from disttrain.data import SlotLoader, StreamLoader
from disttrain.engine import Engine
from disttrain.handlers.bad_steps import BadSteps
from disttrain.handlers.best import Best
from disttrain.handlers.evaluation import Evaluation
from disttrain.handlers.losses import Update
from disttrain.parallel import FsdpGradients, Gradients, Layout, SlotGradients, Slots
from disttrain.parallel.base import Meeting
from disttrain.precision import Precision
from disttrain.run_directory import RunDirectory


@dataclass
class Run:
    """An assembled run: what a config's `handlers` are given beside the trainer."""

    config: Config
    backend: Backend
    directory: RunDirectory
    slots: Slots
    model: nn.Module
    layout: Layout
    optimizer: torch.optim.Optimizer
    schedule: Any
    precision: Precision
    loader: SlotLoader | StreamLoader
    trainer: Engine
    evaluation: Evaluation | None
    data: dict[str, Any]
    """Length and fingerprint of the training data: a run goes on with the data it began with."""
    grad_norm: Tensor | None = None
    """2-norm of the newest step's gradient before clipping, 0-dimensional, on the device; None before it is known."""
    skipped_steps: int = 0
    """Steps over the whole run whose update was left out, by `on_nan` or because scaled gradients overflowed."""
    left_out: dict[int, str] = field(default_factory=dict)
    """Steps, done or still to come, that on_nan=rollback leaves out whole, and what was wrong with each."""
    update_left_out: str | None = None
    """Why the newest step's update was left out; None where it was not."""
    gradients: Gradients | None = None
    """How gradients meet."""
    bad_steps: BadSteps | None = None
    """Looks at the losses, except with on_nan=skip."""
    best: Best | None = None
    """Remembers the best evaluation, with checkpoint.monitor."""
    wait_for_copy: Callable[[], None] = lambda: None
    """Returns when the optimizer's memory is copied, where a checkpoint of it is being made."""
    evaluation_due: bool = False
    """A signal cut the evaluation at this step short: whoever goes on from here does it first."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        if self.config.max_steps is not None:
            return self.config.max_steps
        num_samples: int = self.data["dataset_length"]
        return (self.config.max_epochs or 0) * (num_samples // self.config.global_batch_size)

    @property
    def epoch_length(self) -> int | None:
        """Steps of an epoch; None where the training data is a stream, whose passes end when they end."""
        return len(self.loader) if isinstance(self.loader, SlotLoader) else None

    @property
    def maximum(self) -> dict[str, int]:
        """Where the run ends, as `Engine.run` takes it."""
        if self.config.max_epochs is not None and self.epoch_length is not None:
            return {"max_epochs": self.config.max_epochs}
        return {"max_iters": self.total_steps}

    @property
    def kernels(self) -> str:
        """What decides the bits of a run beside its config: the kernels, and over how many devices a slot is cut."""
        found, num_devices = kernels_of(self.backend.device), self.backend.num_devices
        return found if num_devices == 1 else f"{found}, {num_devices} devices as one ({self.config.strategy})"

    @property
    def epochs_begun(self) -> int:
        """Epochs of which at least one step is done."""
        return self.loader.epoch + (self.loader.step > 0)

    @property
    def meeting(self) -> Meeting | None:
        """How far the newest step's gradients have met; None where that cannot be told."""
        return getattr(self.gradients, "meeting", None)

    def close(self) -> None:
        """End what works for the run, and let its model go."""
        self.loader.close()
        if isinstance(self.gradients, SlotGradients | FsdpGradients):
            self.gradients.close()

    def take_update(self) -> Update:
        """Return the norm of the newest step's gradient and why its update was left out; once, for each step's own."""
        update = self.grad_norm, self.update_left_out
        self.grad_norm = self.update_left_out = None
        return update

    def stands(self, position: Mapping[str, Any]) -> None:
        """Take back what `about` said of the steps before."""
        skipped = position.get("skipped_steps", 0)
        self.skipped_steps = skipped if isinstance(skipped, int) else 0
        self.evaluation_due = position.get("evaluation_due") is True
        self.left_out.update({int(step): str(why) for step, why in position.get("left_out", {}).items()})
        if self.best is not None:
            self.best.stands(position)
        if self.bad_steps is not None:
            self.bad_steps.recent.extend(position.get("recent_losses", ()))

    def about(self) -> About:
        """Return what a checkpoint says of where the run stands, and in what."""
        position = {
            "epoch": self.loader.epoch,
            "step_in_epoch": self.loader.step,
            "samples_seen": self.trainer.state.iteration * self.config.global_batch_size,
            "skipped_steps": self.skipped_steps,
            "global_batch_size": self.config.global_batch_size,
            "kernels": self.kernels,
            **({"evaluation_due": True} if self.evaluation_due else {}),
            **({"left_out": {str(step): why for step, why in sorted(self.left_out.items())}} if self.left_out else {}),
            **({"recent_losses": recent} if (recent := self._recent_losses()) else {}),
            **({} if self.best is None else self.best.about()),
            **self.data,
        }
        return About(
            position=position,
            seed=self.config.seed,
            num_slots=self.slots.num_slots,
            config_sha256=config_hash(self.config),
        )

    def _recent_losses(self) -> list[float]:
        return [] if self.bad_steps is None else list(self.bad_steps.recent)
