"""A Config's factories become the parts of a run, on every rank alike.

*Contract*: whatever can fail on one rank alone is agreed on by all before anyone acts (`backend.agree`). Data
and model are built from seeds of their own, so they are the same on every rank; nothing is written here.
"""

import logging
import math
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from disttrain.backend import Backend
from disttrain.config import Config, check_devices
from disttrain.data import (
    SlotBatchSampler,
    SlotLoader,
    StreamLoader,
    check_dataset,
    check_stream,
    copies_for,
    evaluation_loader,
    is_iterable_style,
)
from disttrain.data.ahead import STREAMS
from disttrain.engine import Events, create_supervised_trainer
from disttrain.engine.parts import prepare_batch, to_device
from disttrain.errors import ConfigError, DisttrainError
from disttrain.handlers.bad_steps import BadSteps
from disttrain.handlers.best import Best, mode_of
from disttrain.handlers.evaluation import Evaluation
from disttrain.observe import batch_hash
from disttrain.parallel import Layout, Slots, Spread, shard, slot_gradients
from disttrain.parallel.ddp import check_model
from disttrain.parallel.left_out import LeavingOut
from disttrain.precision import choose
from disttrain.run import Run
from disttrain.run_directory import RunDirectory
from disttrain.seeding import manual_seed, seed_for

logger = logging.getLogger(__name__)


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
    check_devices(config.global_batch_size, config.num_slots, backend.num_devices)
    with backend.agree("choosing the precision"):
        precision = build("precision", choose, config.precision, backend.device)
    with backend.agree("building the data"):
        manual_seed(seed_for(config.seed, "data"))
        dataset = build("train_data", config.train_data)
        valid = None if config.valid_data is None else build("valid_data", config.valid_data)
        loader, data = loader_of(config, dataset, slots, backend)
    with backend.agree("building the model"):
        manual_seed(seed_for(config.seed, "init"))
        model = backend.move(build("model", config.model))
        if config.compile:
            backend.compile(model)
        check_model(model, backend.device)
    with backend.agree("spreading the model over the ranks"):
        layout = shard(
            model,
            config.strategy,
            slots,
            process_group=backend.process_group,
            reduction=config.reduction,
            device=backend.device,
            num_devices=backend.num_devices,
        )
    with backend.agree("building the optimizer"):
        optimizer = build("optimizer", config.optimizer, [p for p in model.parameters() if p.requires_grad])
        layout.check_optimizer(optimizer)
        model, optimizer = precision.prepare(model, optimizer)
    # Not inside `agree`: this one talks to the other ranks itself.
    gradients = slot_gradients(
        model,
        slots,
        seed=config.seed,
        process_group=backend.process_group,
        gather=backend.gather_recorded,
        reduction=config.reduction,
        device=backend.device,
        layout=layout,
    )
    trainer = create_supervised_trainer(
        gradients.module,
        optimizer,
        **step_functions(config, backend.device, layout),
        device=backend.device,
        non_blocking=backend.device.type in STREAMS,
        output_transform=lambda x, y, y_pred, loss: loss.detach(),
        deterministic=True,
        precision=precision,
        gradients=LeavingOut(gradients, lambda step: step in made.left_out),
        before_step=lambda: before_step(made),
        after_step=lambda stepped: after_step(made, stepped),
        backend=backend,
    )
    made = Run(
        config, backend, directory, slots, model, layout, optimizer, None, precision, loader, trainer, None, data
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: note_left_out(made))
    made.gradients = gradients
    if config.on_nan != "skip":
        made.bad_steps = BadSteps(config.spike_factor)
    with backend.agree("building the schedule, the metrics and the handlers"):
        if config.schedule is not None:
            made.schedule = build("schedule", config.schedule, optimizer, made.total_steps)
        if valid is not None:
            made.evaluation = evaluation_of(made, valid)
            if (monitor := config.checkpoint.monitor) is not None:
                made.best = Best(monitor, mode_of(config.checkpoint.mode, monitor, made.evaluation.metrics), backend)
        for handler in config.handlers:
            build(f"handler {getattr(handler, '__name__', handler)}", handler, trainer, made)
    return made


def loader_of(
    config: Config, dataset: Any, slots: Slots, backend: Backend
) -> tuple[SlotLoader | StreamLoader, dict[str, Any]]:
    """Return the loader of the training data, and what identifies that."""
    size, num_slots = config.global_batch_size, slots.num_slots
    copies = copies_for(backend.device, to_device)
    if not is_iterable_style(dataset):
        data = check_dataset(dataset, "train_data")
        sampler = SlotBatchSampler(len(dataset), size, num_slots, seed=config.seed, slots=slots.mine)
        slot_loader = SlotLoader(
            dataset,
            sampler,
            num_workers=config.num_workers,
            collate_fn=config.collate,
            pin_memory=copies is not None,
            copies=copies,
        )
        return slot_loader, data
    data = check_stream(dataset, "train_data")
    if config.max_epochs is not None and (data["dataset_length"] or 0) < size:
        length = f"with a length of {data['dataset_length']}" if data["dataset_length"] else "without a length"
        raise ConfigError(
            f"max_epochs={config.max_epochs}: expected training data of a known length, at least global_batch_size="
            f"{size} samples, got a stream {length} ({type(dataset).__name__}); say where the run ends by max_steps, "
            "with max_epochs=none, or give it a __len__(self)"
        )
    loader = StreamLoader(
        dataset,
        size,
        num_slots,
        seed=config.seed,
        slots=slots.mine,
        ranks=backend,
        num_workers=config.num_workers,
        collate_fn=config.collate,
        digest=batch_hash,
        accept_other_data=config.accept_other_data,
        pin_memory=copies is not None,
    )
    return loader, {**data, "shards": num_slots if loader.sharded else None}


def step_functions(config: Config, device: torch.device, layout: Layout) -> dict[str, Any]:
    """Return the step body's parts: the loss of (x, y) batches, or the config's own `forward`."""
    if config.forward is None:
        parts: dict[str, Any] = {"loss_fn": loss_of(config, device)}
        if isinstance(layout, Spread):
            parts["prepare_batch"] = lambda *args, **options: layout.cut(prepare_batch(*args, **options))
        return parts
    forward, move = config.forward, mover(layout)
    return {
        "prepare_batch": lambda batch, device, non_blocking: (move(batch, device, non_blocking), None),
        "model_fn": forward,
        "loss_fn": lambda y_pred, y: y_pred[0],
    }


def mover(layout: Layout) -> Callable[..., Any]:
    """Return what brings a batch to the device, and over the devices where a rank has several."""
    if isinstance(layout, Spread):
        return lambda batch, *where: layout.cut(to_device(batch, *where))
    return to_device


def loss_of(config: Config, device: torch.device) -> Callable[..., Tensor]:
    """Return the config's loss, its weights (if it is a module) on the device."""
    assert config.loss is not None, "a Config has loss or forward"
    return config.loss.to(device) if isinstance(config.loss, nn.Module) else config.loss


def compute_of(config: Config, device: torch.device, layout: Layout) -> Callable[[nn.Module, Any], tuple[Tensor, Any]]:
    """Return (model, batch) -> (loss, outputs) for the validation data; outputs are what metrics take."""
    move = mover(layout)
    forward, loss = config.forward, None if config.loss is None else loss_of(config, device)

    def compute(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        moved = move(batch, device)
        if forward is not None:
            return forward(model, moved)
        assert loss is not None, "a Config has loss or forward"
        x, y = moved
        y_pred = model(x)
        return loss(y_pred, y), (y_pred, y)

    if isinstance(layout, Spread):
        return lambda model, batch: layout.bring_together(compute(model, batch))
    return compute


def before_step(made: Run) -> bool | None:
    """Note and clip the reduced gradient; False leaves the step out. The same on every rank, for the gradient is."""
    limit = made.config.grad_clip_norm
    parameters = [parameter for parameter in made.model.parameters() if parameter.grad is not None]
    norm = made.layout.total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    made.grad_norm = norm
    if limit is not None:
        made.layout.clip(parameters, limit, norm)
    made.wait_for_copy()  # the optimizer steps next
    return False if made.config.on_nan == "skip" and not math.isfinite(norm) else None


def after_step(made: Run, stepped: bool) -> None:
    """Step the schedule with the optimizer and only then; count a step that was left out, whoever left it out.

    Not in a hook of the optimizer's: a fused one is called also where it then finds an overflow and does nothing.
    """
    if stepped and made.schedule is not None:
        made.schedule.step()
    if not stepped:
        made.skipped_steps += 1
        norm = math.nan if made.grad_norm is None else float(made.grad_norm)
        made.update_left_out = f"its gradient's norm is {norm}"
        logger.warning("step %d is left out: %s", made.trainer.state.iteration, made.update_left_out)


def note_left_out(made: Run) -> None:
    """Count a step that was left out whole, where the run had gone back for it."""
    step = made.trainer.state.iteration
    if (reason := made.left_out.get(step)) is not None:
        made.skipped_steps += 1
        made.update_left_out = reason
        logger.warning("step %d is left out: %s when it was first done", step, reason)


def evaluation_of(made: Run, dataset: Dataset[Any]) -> Evaluation:
    """Build the validation side; its batches are as large as a slot's, on any number of ranks."""
    config, backend = made.config, made.backend
    check_dataset(dataset, "valid_data")
    metrics = {name: build(f"metric {name}", make).to(backend.metrics_device) for name, make in config.metrics.items()}
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
            pin_memory=backend.device.type in STREAMS,
        ),
        compute_of(config, backend.device, made.layout),
        metrics,
        precision=made.precision,
        backend=backend,
        gathered=made.layout.gathered,
    )
