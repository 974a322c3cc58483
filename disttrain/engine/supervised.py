"""The one training step body, its evaluation sibling, and the factories that put parts in their places.

    zero the gradients at an update's first iteration
    for each microbatch of the batch:        # gradients.microbatches: one, unless the run is cut into slots
        x, y = prepare_batch(microbatch)
        with precision.forward():
            y_pred = model_transform(model_fn(model, x))
            loss = loss_fn(y_pred, y)
        precision.backward(loss / gradients.divisor)
    at its last: precision.update()          # unscale, before_step, step; then after_step
    output_transform(x, y, y_pred, loss)

*Contract*: the four public `supervised_training_step*` are this body with another `Precision` in its place. The
loss is divided for the backward and handed on undivided. A step starts with the whole model in training
mode, an evaluation step with all of it in evaluation mode. Under DDP no gradients are sent before an
update's last microbatch.

*Errors*: ValueError for arguments that exclude each other; RuntimeError for an xla device without torch_xla;
ModuleNotFoundError, with what to install, where apex or torch_xla is absent.

*Cost*: everything is resolved when the step is made; what it adds to the same step by hand is about a
microsecond.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from disttrain.backend.base import Backend
from disttrain.engine.deterministic import DeterministicEngine
from disttrain.engine.engine import Engine
from disttrain.engine.parts import (
    Device,
    LossFn,
    ModelFn,
    ModelTransform,
    PrepareBatch,
    Step,
    TrainOutput,
    call_model,
    check_amp_mode,
    device_kind,
    identity,
    loss_item,
    mode_setter,
)
from disttrain.engine.parts import prepare_batch as default_prepare_batch
from disttrain.parallel.base import Accumulation, Gradients
from disttrain.precision.amp import AMP
from disttrain.precision.apex import Apex
from disttrain.precision.base import FP32, BeforeStep, Precision
from disttrain.precision.xla import INSTALL, XLA, has_torch_xla

AfterStep = Callable[[bool], object]
"""Called after each update with whether the optimizer stepped: steps a schedule, counts what was skipped."""


def _training_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    device: Device,
    non_blocking: bool,
    prepare_batch: PrepareBatch,
    model_transform: ModelTransform,
    output_transform: TrainOutput,
    model_fn: ModelFn,
    precision: Precision,
    gradients: Gradients,
    before_step: BeforeStep | None = None,
    after_step: AfterStep | None = None,
) -> Step:
    """Return the step body over these parts."""
    set_mode = mode_setter(model, training=True)
    divisor, several = gradients.divisor, gradients.several
    opens, closes = gradients.opens, gradients.closes
    microbatches_of: Callable[[Any, int], Iterable[Any]] = gradients.microbatches
    if divisor == 1 and type(gradients) is Accumulation:  # most runs: there is nothing to hold back
        opens, closes, microbatches_of = _always, _always, _whole
    forward, backward, update = precision.forward, precision.backward, precision.update
    plain = model_fn is call_model  # then the model is called here: that much shorter is the way to it

    def step(engine: Engine, batch: Any) -> Any:
        iteration = engine.state.iteration
        set_mode()
        if opens(iteration):
            optimizer.zero_grad()  # no arguments: apex's optimizers take none
        outputs = []
        microbatches = microbatches_of(batch, iteration)
        try:
            for microbatch in microbatches:
                x, y = prepare_batch(microbatch, device=device, non_blocking=non_blocking)
                with forward():
                    y_pred = model_transform(model(x) if plain else model_fn(model, x))
                    loss = loss_fn(y_pred, y)
                backward(loss if divisor == 1 else loss / divisor, optimizer)
                if several:
                    outputs.append(output_transform(x, y, y_pred, loss))
        except BaseException:
            # Whoever keeps the exception keeps the generator too, and what it holds back (DDP's no_sync).
            getattr(microbatches, "close", _nothing)()
            raise
        if closes(iteration):
            stepped = update(optimizer, before_step)
            if after_step is not None:
                after_step(stepped)
        # One output is made last: its `.item()` then waits while the device already has the update's work.
        return outputs if several else output_transform(x, y, y_pred, loss)

    return step


def _nothing() -> None:
    return None


def _always(iteration: int) -> bool:
    return True


def _whole(batch: Any, iteration: int) -> Iterable[Any]:
    return (batch,)


def supervised_training_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    device: Device = None,
    non_blocking: bool = False,
    prepare_batch: PrepareBatch = default_prepare_batch,
    model_transform: ModelTransform = identity,
    output_transform: TrainOutput = loss_item,
    gradient_accumulation_steps: int = 1,
    model_fn: ModelFn = call_model,
) -> Step:
    """Return a process function that trains in float32."""
    parts = (device, non_blocking, prepare_batch, model_transform, output_transform, model_fn)
    gradients = Accumulation(model, gradient_accumulation_steps)
    return _training_step(model, optimizer, loss_fn, *parts, FP32(), gradients)


def supervised_training_step_amp(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    device: Device = None,
    non_blocking: bool = False,
    prepare_batch: PrepareBatch = default_prepare_batch,
    model_transform: ModelTransform = identity,
    output_transform: TrainOutput = loss_item,
    scaler: GradScaler | None = None,
    gradient_accumulation_steps: int = 1,
    model_fn: ModelFn = call_model,
    dtype: torch.dtype | None = None,
) -> Step:
    """Return a process function that trains under `torch.autocast`, on the device's type or else the model's.

    `dtype` is torch.float16 or torch.bfloat16; None takes float16 with a scaler, and without one what autocast
    takes by itself (CUDA: float16, CPU: bfloat16).
    """
    parts = (device, non_blocking, prepare_batch, model_transform, output_transform, model_fn)
    gradients = Accumulation(model, gradient_accumulation_steps)
    return _training_step(model, optimizer, loss_fn, *parts, AMP(device_kind(model, device), dtype, scaler), gradients)


def supervised_training_step_apex(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    device: Device = None,
    non_blocking: bool = False,
    prepare_batch: PrepareBatch = default_prepare_batch,
    model_transform: ModelTransform = identity,
    output_transform: TrainOutput = loss_item,
    gradient_accumulation_steps: int = 1,
    model_fn: ModelFn = call_model,
) -> Step:
    """Return a process function that trains a model and an optimizer that `apex.amp.initialize` prepared."""
    parts = (device, non_blocking, prepare_batch, model_transform, output_transform, model_fn)
    gradients = Accumulation(model, gradient_accumulation_steps)
    return _training_step(model, optimizer, loss_fn, *parts, _apex(model, gradient_accumulation_steps), gradients)


def supervised_training_step_tpu(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    device: Device = None,
    non_blocking: bool = False,
    prepare_batch: PrepareBatch = default_prepare_batch,
    model_transform: ModelTransform = identity,
    output_transform: TrainOutput = loss_item,
    gradient_accumulation_steps: int = 1,
    model_fn: ModelFn = call_model,
) -> Step:
    """Return a process function that trains on an XLA device, stepping by `xm.optimizer_step`."""
    parts = (device, non_blocking, prepare_batch, model_transform, output_transform, model_fn)
    gradients = Accumulation(model, gradient_accumulation_steps)
    return _training_step(model, optimizer, loss_fn, *parts, XLA(), gradients)


def create_supervised_trainer(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    device: Device = None,
    non_blocking: bool = False,
    prepare_batch: PrepareBatch = default_prepare_batch,
    model_transform: ModelTransform = identity,
    output_transform: TrainOutput = loss_item,
    deterministic: bool = False,
    amp_mode: str | None = None,
    scaler: bool | GradScaler = False,
    gradient_accumulation_steps: int = 1,
    model_fn: ModelFn = call_model,
    *,
    precision: Precision | None = None,
    gradients: Gradients | None = None,
    before_step: BeforeStep | None = None,
    after_step: AfterStep | None = None,
    backend: Backend | None = None,
) -> Engine:
    """Return an engine that trains `model`: the step body with the parts that these arguments pick.

    The device and `amp_mode` (None, "amp" or "apex") pick the precision, `gradient_accumulation_steps` how
    gradients come together; `precision` and `gradients` say it outright, and then the others must be left
    alone. `state.scaler` is there with `scaler=True` alone. `before_step` runs before each optimizer step,
    with the gradients unscaled and reduced, and skips it by returning False; `after_step(stepped)` runs after each
    update and hears whether the optimizer stepped, which is when a learning rate's schedule is to step.
    `backend` is whose rank 0 draws the seed of a deterministic engine.
    """
    if precision is not None and (amp_mode is not None or scaler is not False):
        raise ValueError(f"expected precision alone or amp_mode and scaler, got both (amp_mode={amp_mode!r})")
    if gradients is not None and gradient_accumulation_steps != 1:
        raise ValueError(
            "expected gradients alone or gradient_accumulation_steps, "
            f"got both (gradient_accumulation_steps={gradient_accumulation_steps})"
        )
    precision = precision or _pick(model, device, amp_mode, scaler, gradient_accumulation_steps)
    gradients = gradients or Accumulation(model, gradient_accumulation_steps)
    parts = (device, non_blocking, prepare_batch, model_transform, output_transform, model_fn)
    step = _training_step(model, optimizer, loss_fn, *parts, precision, gradients, before_step, after_step)
    trainer = DeterministicEngine(step, backend=backend) if deterministic else Engine(step)
    if scaler is True and isinstance(precision, AMP):
        trainer.state.scaler = precision.scaler
    return trainer


def _pick(
    model: nn.Module, device: Device, amp_mode: str | None, scaler: bool | GradScaler, accumulation_steps: int
) -> Precision:
    """Return the precision that the contract gives for `amp_mode`, `scaler` and the device."""
    check_amp_mode(amp_mode, device, ("amp", "apex"))
    if scaler and amp_mode != "amp":
        raise ValueError(f'expected amp_mode="amp" with a scaler, got amp_mode={amp_mode!r}; use it, or scaler=False')
    if device is not None and torch.device(device).type == "xla":
        if not has_torch_xla():
            raise RuntimeError(f"expected torch_xla for device {str(device)!r}, which is not installed; {INSTALL}")
        return XLA()
    if amp_mode == "amp":
        return AMP(device_kind(model, device), scaler=scaler)
    return _apex(model, accumulation_steps) if amp_mode == "apex" else FP32()


def _apex(model: nn.Module, accumulation_steps: int) -> Apex:
    """Return apex; under DDP a window's gradients meet at its end, and stay scaled until they have."""
    return Apex(unscale_at_update=accumulation_steps > 1 and hasattr(model, "no_sync"))
