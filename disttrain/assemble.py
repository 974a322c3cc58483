"""A Config's factories become the parts of a run, on every rank alike.

*Contract*: whatever can fail on one rank alone is agreed on by all before anyone acts (`backend.agree`). Data
and model are built from seeds of their own, so they are the same on every rank; nothing is written here.
"""

import logging
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from disttrain.backend import Backend
from disttrain.checkpoint import About
from disttrain.config import Config, config_hash
from disttrain.data import SlotBatchSampler, SlotLoader, check_dataset, evaluation_loader
from disttrain.engine import Engine, create_supervised_trainer
from disttrain.engine.parts import to_device
from disttrain.errors import ConfigError, DisttrainError
from disttrain.handlers.evaluation import Evaluation
from disttrain.parallel import SlotGradients, Slots
from disttrain.precision import Precision, choose
from disttrain.run_directory import RunDirectory
from disttrain.seeding import manual_seed, seed_for

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """An assembled run: what a config's `handlers` are given beside the trainer."""

    config: Config
    backend: Backend
    directory: RunDirectory
    slots: Slots
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any
    precision: Precision
    loader: SlotLoader
    trainer: Engine
    evaluation: Evaluation | None
    data: dict[str, Any]
    """Length and fingerprint of the training data: a run goes on with the data it began with."""
    skipped_steps: int = 0
    """Steps that on_nan=skip left out, over the whole run."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.max_steps or (self.config.max_epochs or 0) * len(self.loader)

    def about(self) -> About:
        """Return what a checkpoint says of where the run stands, and in what."""
        step = self.trainer.state.iteration
        position = {
            "epoch": step // len(self.loader),
            "step_in_epoch": step % len(self.loader),
            "samples_seen": step * self.config.global_batch_size,
            "skipped_steps": self.skipped_steps,
            "global_batch_size": self.config.global_batch_size,
            **self.data,
        }
        return About(
            position=position,
            seed=self.config.seed,
            num_slots=self.slots.num_slots,
            config_sha256=config_hash(self.config),
        )


def build(what: str, factory: Callable[..., Any], *args: Any) -> Any:
    """Call a factory of the config; what it raises becomes a ConfigError that says where."""
    try:
        return factory(*args)
    except DisttrainError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{what} raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno}, in {place.name})"
        ) from error


def assemble(config: Config, backend: Backend, directory: RunDirectory) -> Run:
    """Build data, model and optimizer on every rank, alike, and put the trainer together from them."""
    if config.num_slots is None:
        raise ConfigError("num_slots is not resolved; expected a number here, as disttrain.launch gives it")
    slots = Slots(config.num_slots, backend.rank, backend.world_size)
    with backend.agree("building the data"):
        manual_seed(seed_for(config.seed, "data"))
        dataset = build("train_data", config.train_data)
        valid = None if config.valid_data is None else build("valid_data", config.valid_data)
        data = check_dataset(dataset, "train_data")
        sampler = SlotBatchSampler(
            len(dataset), config.global_batch_size, slots.num_slots, seed=config.seed, slots=slots.mine
        )
        loader = SlotLoader(dataset, sampler, num_workers=config.num_workers, collate_fn=config.collate)
    with backend.agree("building the model"):
        precision = choose(config.precision, backend.device)
        manual_seed(seed_for(config.seed, "init"))
        model = build("model", config.model).to(backend.device)
        if config.compile:
            model.compile()
    # Not inside `agree`: this one talks to the other ranks itself.
    gradients = SlotGradients(
        model,
        slots,
        seed=config.seed,
        process_group=backend.process_group,
        reduction=config.reduction,
        device=backend.device,
    )
    with backend.agree("building the optimizer"):
        optimizer = build("optimizer", config.optimizer, [p for p in model.parameters() if p.requires_grad])
    trainer = create_supervised_trainer(
        gradients.module,
        optimizer,
        **step_functions(config, backend.device),
        device=backend.device,
        output_transform=lambda x, y, y_pred, loss: loss.detach(),
        deterministic=True,
        precision=precision,
        gradients=gradients,
        before_step=lambda: before_step(made),
        backend=backend,
    )
    made = Run(config, backend, directory, slots, model, optimizer, None, precision, loader, trainer, None, data)
    with backend.agree("building the schedule, the metrics and the handlers"):
        if config.schedule is not None:
            made.schedule = build("schedule", config.schedule, optimizer, made.total_steps)
            # After the optimizer's own step and only then: a skipped step is none for the schedule.
            optimizer.register_step_post_hook(lambda *_: made.schedule.step())
        if valid is not None:
            made.evaluation = evaluation_of(made, valid)
        for handler in config.handlers:
            build(f"handler {getattr(handler, '__name__', handler)}", handler, trainer, made)
    return made


def step_functions(config: Config, device: torch.device) -> dict[str, Any]:
    """Return the step body's parts: the loss of (x, y) batches, or the config's own `forward`."""
    if config.forward is None:
        return {"loss_fn": loss_of(config, device)}
    forward = config.forward
    return {
        "prepare_batch": lambda batch, device, non_blocking: (to_device(batch, device, non_blocking), None),
        "model_fn": forward,
        "loss_fn": lambda y_pred, y: y_pred[0],
    }


def loss_of(config: Config, device: torch.device) -> Callable[..., Tensor]:
    """Return the config's loss, its weights (if it is a module) on the device."""
    assert config.loss is not None, "a Config has loss or forward"
    return config.loss.to(device) if isinstance(config.loss, nn.Module) else config.loss


def compute_of(config: Config, device: torch.device) -> Callable[[nn.Module, Any], tuple[Tensor, Any]]:
    """Return (model, batch) -> (loss, outputs) for the validation data; outputs are what metrics take."""
    if config.forward is not None:
        forward = config.forward
        return lambda model, batch: forward(model, to_device(batch, device))
    loss = loss_of(config, device)

    def compute(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        x, y = to_device(batch, device)
        y_pred = model(x)
        return loss(y_pred, y), (y_pred, y)

    return compute


def before_step(made: Run) -> bool | None:
    """Clip the reduced gradient; False leaves the step out. The same on every rank, for the gradient is."""
    limit, skip = made.config.grad_clip_norm, made.config.on_nan == "skip"
    if limit is None and not skip:
        return None
    norm = nn.utils.clip_grad_norm_(made.model.parameters(), math.inf if limit is None else limit)
    if skip and not math.isfinite(norm):
        made.skipped_steps += 1
        logger.warning("step %d is left out: its gradient's norm is %s", made.trainer.state.iteration, float(norm))
        return False
    return True


def evaluation_of(made: Run, dataset: Dataset[Any]) -> Evaluation:
    """Build the validation side; its batches are as large as a slot's, on any number of ranks."""
    config, backend = made.config, made.backend
    check_dataset(dataset, "valid_data")
    metrics = {name: build(f"metric {name}", make).to(backend.device) for name, make in config.metrics.items()}
    return Evaluation(
        made.model,
        lambda: evaluation_loader(
            dataset,
            config.global_batch_size // made.slots.num_slots,
            rank=backend.rank,
            world_size=backend.world_size,
            seed=config.seed,
            num_workers=config.num_workers,
            collate_fn=config.collate,
        ),
        compute_of(config, backend.device),
        metrics,
        precision=made.precision,
        backend=backend,
    )
