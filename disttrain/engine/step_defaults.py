"""The shared parts of the supervised factories: the types of the callables they take, the defaults, the checks."""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from disttrain.devices import INSTALL_TORCH_XLA, device_row, has_torch_xla
from disttrain.engine.engine import Engine
from disttrain.precision.amp import AMP
from disttrain.precision.apex import Apex
from disttrain.precision.base import FP32, Precision
from disttrain.precision.xla import XLA

Device = str | torch.device | None
Step = Callable[[Engine, Any], Any]
PrepareBatch = Callable[..., tuple[Any, Any]]
"""`(batch, device=..., non_blocking=...) -> (x, y)`"""
LossFn = Callable[[Any, Any], Tensor]
ModelFn = Callable[[Any, Any], Any]
"""`(model, x) -> output` of the model"""
ModelTransform = Callable[[Any], Any]
TrainOutput = Callable[[Any, Any, Any, Tensor], Any]
"""`(x, y, y_pred, loss) -> engine.state.output`"""
EvaluationOutput = Callable[[Any, Any, Any], Any]
"""`(x, y, y_pred) -> engine.state.output`"""


def prepare_batch(batch: Any, device: Device = None, non_blocking: bool = False) -> tuple[Any, Any]:
    """Return x and y of `batch`, moved to `device` if there is one."""
    x, y = batch
    if device is None:
        return x, y
    return to_device(x, device, non_blocking), to_device(y, device, non_blocking)


def to_device(value: Any, device: str | torch.device, non_blocking: bool = False) -> Any:
    """Return `value` on `device`: a tensor, any object with a `.to(device)`, or tuples, lists and dicts of them.

    Containers keep their type. Values without a tensor (a string, a number, None) are returned unchanged.
    """
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=non_blocking)
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device, non_blocking) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(to_device(item, device, non_blocking) for item in value)
    if isinstance(value, Mapping):
        moved = {key: to_device(item, device, non_blocking) for key, item in value.items()}
        return moved if type(value) is dict else type(value)(moved)  # type: ignore[call-arg]
    return value


def identity(output: Any) -> Any:
    return output


def call_model(model: Any, x: Any) -> Any:
    return model(x)


def loss_item(x: Any, y: Any, y_pred: Any, loss: Tensor) -> Any:
    return loss.item()


def pred_and_y(x: Any, y: Any, y_pred: Any) -> tuple[Any, Any]:
    return y_pred, y


def mode_setter(model: nn.Module, training: bool) -> Callable[[], None]:
    """Return a function that puts all of `model` into training or evaluation mode; call it when a step begins.

    *Cost*: reading the mode of every module takes a fiftieth of the time of setting it. So the mode is set only if some
    module has the other one. A model with a `train` or `eval` method of its own is switched at each step, since that
    method may do something else.
    """
    switch = model.train if training else model.eval
    modules = tuple(model.modules())
    own = any(not getattr(module, switch.__name__).__module__.startswith("torch.") for module in modules)
    if own or any("training" not in vars(module) for module in modules):

        def always() -> None:
            switch()

        return always
    attributes, mode_of = [vars(module) for module in modules], itemgetter("training")

    def set_mode() -> None:
        if not all(map(mode_of, attributes)) if training else any(map(mode_of, attributes)):
            switch()

    return set_mode


def device_kind(model: nn.Module, device: Device) -> str:
    """Return the type of `device`, or of the device of the model's parameters if it is None."""
    if device is not None:
        return torch.device(device).type
    parameter = next(model.parameters(), None)
    return "cpu" if parameter is None else parameter.device.type


def check_amp_mode(amp_mode: str | None, device: Device, modes: tuple[str, ...]) -> None:
    """Raise ValueError unless `amp_mode` is None, or one of `modes` on a device that supports them."""
    if amp_mode is None:
        return
    if amp_mode not in modes:
        raise ValueError(f"expected amp_mode None or one of {modes}, got {amp_mode!r}")
    if device is not None and not device_row(device).autocasts:
        kind = torch.device(device).type
        raise ValueError(f"amp_mode={amp_mode!r} cannot be used with a device of type {kind}; use amp_mode=None")


def choose_precision_of(
    model: nn.Module, device: Device, amp_mode: str | None, scaler: bool | GradScaler, accumulation_steps: int
) -> Precision:
    """Return the precision that belongs to `amp_mode`, `scaler` and the device."""
    check_amp_mode(amp_mode, device, ("amp", "apex"))
    if scaler and amp_mode != "amp":
        raise ValueError(
            f'expected amp_mode="amp" with a scaler, got amp_mode={amp_mode!r}; set amp_mode="amp" or scaler=False'
        )
    if device is not None and torch.device(device).type == "xla":
        if not has_torch_xla():
            raise RuntimeError(
                f"expected torch_xla for device {str(device)!r}, got no such package; {INSTALL_TORCH_XLA}"
            )
        return XLA()
    if amp_mode == "amp":
        return AMP(device_kind(model, device), scaler=scaler)
    return apex_of(model, accumulation_steps) if amp_mode == "apex" else FP32()


def apex_of(model: nn.Module, accumulation_steps: int) -> Apex:
    """Return apex. Under DDP gradients are reduced at the end of an accumulation window and stay scaled until then."""
    return Apex(unscale_at_update=accumulation_steps > 1 and hasattr(model, "no_sync"))
