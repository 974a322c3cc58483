"""The one training step body, and the factories that put its parts together.

    zero the gradients at an update's first iteration
    for each microbatch of the batch:        # gradients.microbatches: one, or one for each slot
        x, y = prepare_batch(microbatch)
        with precision.forward():
            y_pred = model_transform(model_fn(model, x))
            loss = loss_fn(y_pred, y)
        precision.backward(loss / gradients.divisor)
    at its last: precision.update()          # unscale, before_step, step; then after_step
    output_transform(x, y, y_pred, loss)

*Contract*: the four public `supervised_training_step*` are this body with four different `Precision` objects. The loss
is divided for the backward and passed on undivided. A step starts with the whole model in training mode. Under DDP no
gradients are sent before an update's last microbatch.

*Errors*: ValueError for arguments that exclude each other. RuntimeError for an xla device without torch_xla.
ModuleNotFoundError, which names the package to install, if apex or torch_xla is absent.

*Cost*: every choice is made when the step is made. The step takes about a microsecond more than the same step written
by hand.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from disttrain.backend.base import Backend
from disttrain.engine.deterministic import DeterministicEngine
from disttrain.engine.engine import Engine
from disttrain.engine.step_defaults import (
    Device,
    LossFn,
    ModelFn,
    ModelTransform,
    PrepareBatch,
    Step,
    TrainOutput,
    apex_of,
    call_model,
    choose_precision_of,
    device_kind,
    identity,
    loss_item,
    mode_setter,
)
from disttrain.engine.step_defaults import prepare_batch as default_prepare_batch
from disttrain.parallel.gradients import Accumulation, Gradients
from disttrain.parallel.window import AccumulationWindow
from disttrain.precision.amp import AMP
from disttrain.precision.base import FP32, BeforeStep, Precision
from disttrain.precision.xla import XLA

AfterStep = Callable[[bool], object]
"""Called after each update with True if the optimizer stepped, else False; it can step a schedule or count skips."""
StepResult = tuple[Tensor, Any, Mapping[str, Any]]
"""(loss, outputs, values): `values` are further numbers by name, for the curves; mostly there are none."""


def training_step(
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
    """Return the step body with these parts."""
    set_mode = mode_setter(model, training=True)
    divisor, several = gradients.divisor, gradients.several
    opens, closes = gradients.opens, gradients.closes
    microbatches_of: Callable[[Any, int], Iterable[Any]] = gradients.microbatches
    if divisor == 1 and type(gradients) is Accumulation:  # the shorter way, for updates of one microbatch
        opens, closes, microbatches_of = _always, _always, _whole_batch
    forward, backward, update = precision.forward, precision.backward, precision.update
    window = AccumulationWindow(divisor, model, optimizer) if divisor > 1 and type(gradients) is Accumulation else None
    plain = model_fn is call_model  # then the step calls the model itself, which saves a call

    def step(engine: Engine, batch: Any) -> Any:
        iteration = engine.state.iteration
        set_mode()
        if opens(iteration):
            optimizer.zero_grad()  # no arguments: apex's optimizers take none
        if window is not None:
            window.begins(engine, iteration)
        outputs = []
        microbatches = microbatches_of(batch, iteration)
        try:
            for microbatch in microbatches:
                x, y = prepare_batch(microbatch, device=device, non_blocking=non_blocking)
                with forward():
                    y_pred = model_transform(model(x) if plain else model_fn(model, x))
                    loss = loss_fn(y_pred, y)
                backward(loss if divisor == 1 else loss / divisor, optimizer)
                if several and not gradients.rehearsing:
                    outputs.append(output_transform(x, y, y_pred, loss))
        except BaseException:
            # A kept exception would keep the generator alive, and with it the contexts inside (DDP's no_sync).
            getattr(microbatches, "close", _nothing)()
            raise
        if closes(iteration):
            stepped = update(optimizer, before_step)
            if after_step is not None:
                after_step(stepped)
        if window is not None:
            window.ends(engine, iteration)
        # A single output is made last: the device then has the update's work while `.item()` waits.
        return outputs if several else output_transform(x, y, y_pred, loss)

    return step


class StepFunction(nn.Module):
    """The computation of a config for a batch on the device: `forward(batch) -> (loss, outputs, values)`.

    *Contract*: the bare `model` is called by `step(model, batch)`, or as `loss(model(x), y)` for batches (x, y), with
    the outputs (model(x), y) and no values. Model, loss and step are parts of one Module: if they have parameters or
    buffers, these are trained, moved, put into evaluation mode and saved with those of the model.
    """

    def __init__(self, model: nn.Module, loss: LossFn | None, step: Callable[[Any, Any], Any] | None):
        super().__init__()
        self.model = model
        self.loss = loss
        self.step = step
        # Functions, which a subclass may replace, and no Modules: loss and step are parts of this Module already.
        self.pair: Callable[[Any], tuple[Any, Any]] = identity
        self.loss_of: LossFn | None = None if loss is None else partial(loss)
        self.result_of: Callable[[Any, Any], StepResult] | None = None if step is None else partial(_tripled, step)

    def forward(self, batch: Any) -> StepResult:
        if self.result_of is not None:
            return self.result_of(self.model, batch)
        assert self.loss_of is not None, "a Config has loss or forward"
        x, y = self.pair(batch)
        y_pred = self.model(x)
        return self.loss_of(y_pred, y), (y_pred, y), {}


def _tripled(step: Callable[[Any, Any], Any], model: Any, batch: Any) -> StepResult:
    loss, outputs, *values = step(model, batch)
    return loss, outputs, values[0] if values else {}


def _nothing() -> None:
    return None


def _always(iteration: int) -> bool:
    return True


def _whole_batch(batch: Any, iteration: int) -> Iterable[Any]:
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
    return training_step(model, optimizer, loss_fn, *parts, FP32(), gradients)


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
    """Return a process function that trains under `torch.autocast` for the type of `device`, or of the model's device.

    `dtype` is torch.float16 or torch.bfloat16. None means float16 with a scaler, and without one the default of
    autocast (CUDA: float16, CPU: bfloat16).
    """
    parts = (device, non_blocking, prepare_batch, model_transform, output_transform, model_fn)
    gradients = Accumulation(model, gradient_accumulation_steps)
    return training_step(model, optimizer, loss_fn, *parts, AMP(device_kind(model, device), dtype, scaler), gradients)


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
    """Return a process function that trains a model and an optimizer prepared by `apex.amp.initialize`."""
    parts = (device, non_blocking, prepare_batch, model_transform, output_transform, model_fn)
    gradients = Accumulation(model, gradient_accumulation_steps)
    return training_step(model, optimizer, loss_fn, *parts, apex_of(model, gradient_accumulation_steps), gradients)


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
    """Return a process function that trains on an XLA device and steps with `xm.optimizer_step`."""
    parts = (device, non_blocking, prepare_batch, model_transform, output_transform, model_fn)
    gradients = Accumulation(model, gradient_accumulation_steps)
    return training_step(model, optimizer, loss_fn, *parts, XLA(), gradients)


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
    around_step: Callable[[Step], Step] = identity,
    backend: Backend | None = None,
) -> Engine:
    """Return an engine that trains `model` with the step body, whose parts these arguments choose.

    The device and `amp_mode` (None, "amp" or "apex") choose the precision. `gradient_accumulation_steps` chooses how
    gradients are added up. `precision` and `gradients` set the two directly, and then the others must keep their
    defaults. `state.scaler` exists only with `scaler=True`.

    `before_step` runs before each optimizer step, when the gradients are unscaled and reduced. It skips the step by
    returning False. `after_step(stepped)` runs after each update; `stepped` is whether the optimizer stepped, and only
    then should a learning rate schedule step. `around_step(step)` is what the engine calls in place of the step
    body. Rank 0 of `backend` draws the seed of a deterministic engine.
    """
    if precision is not None and (amp_mode is not None or scaler is not False):
        raise ValueError(f"expected precision alone or amp_mode and scaler, got both (amp_mode={amp_mode!r})")
    if gradients is not None and gradient_accumulation_steps != 1:
        raise ValueError(
            "expected gradients alone or gradient_accumulation_steps, "
            f"got both (gradient_accumulation_steps={gradient_accumulation_steps})"
        )
    precision = precision or choose_precision_of(model, device, amp_mode, scaler, gradient_accumulation_steps)
    gradients = gradients or Accumulation(model, gradient_accumulation_steps)
    parts = (device, non_blocking, prepare_batch, model_transform, output_transform, model_fn)
    step = around_step(training_step(model, optimizer, loss_fn, *parts, precision, gradients, before_step, after_step))
    trainer = DeterministicEngine(step, backend=backend) if deterministic else Engine(step)
    if scaler is True and isinstance(precision, AMP):
        trainer.state.scaler = precision.scaler
    return trainer
