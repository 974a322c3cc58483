"""What the supervised factories share: the types of the callables they take, the defaults, two checks."""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.engine.engine import Engine

Device = str | torch.device | None
Step = Callable[[Engine, Any], Any]
PrepareBatch = Callable[..., tuple[Any, Any]]
"""(batch, device=..., non_blocking=...) -> (x, y)"""
LossFn = Callable[[Any, Any], Tensor]
ModelFn = Callable[[Any, Any], Any]
"""(model, x) -> the model's output"""
ModelTransform = Callable[[Any], Any]
TrainOutput = Callable[[Any, Any, Any, Tensor], Any]
"""(x, y, y_pred, loss) -> `engine.state.output`"""
EvaluationOutput = Callable[[Any, Any, Any], Any]
"""(x, y, y_pred) -> `engine.state.output`"""


def prepare_batch(batch: Any, device: Device = None, non_blocking: bool = False) -> tuple[Any, Any]:
    """Return `x, y = batch`, on `device` where one is given."""
    x, y = batch
    if device is None:
        return x, y
    return to_device(x, device, non_blocking), to_device(y, device, non_blocking)


def to_device(value: Any, device: str | torch.device, non_blocking: bool = False) -> Any:
    """Return `value` on `device`: a tensor, anything with a `.to(device)`, or tuples, lists and dicts of them.

    Containers keep their type; what holds no tensor (a string, a number, None) comes back as it is.
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
    """Return what puts all of `model` into training mode, or into evaluation mode, when a step begins.

    *Cost*: asking every module takes a fiftieth of telling it, so only a model that is not all in that mode is
    told; or at each step one with a `train` or `eval` of its own, which may mean something else.
    """
    switch = model.train if training else model.eval
    modules = tuple(model.modules())
    own = any(not getattr(module, switch.__name__).__module__.startswith("torch.") for module in modules)
    if own or any("training" not in vars(module) for module in modules):

        def always() -> None:
            switch()

        return always
    values, ask = [vars(module) for module in modules], itemgetter("training")

    def set_mode() -> None:
        if not all(map(ask, values)) if training else any(map(ask, values)):
            switch()

    return set_mode


def device_kind(model: nn.Module, device: Device) -> str:
    """Return the type of `device`, or else of the model's parameters."""
    if device is not None:
        return torch.device(device).type
    parameter = next(model.parameters(), None)
    return "cpu" if parameter is None else parameter.device.type


def check_amp_mode(amp_mode: str | None, device: Device, modes: tuple[str, ...]) -> None:
    """Raise ValueError unless `amp_mode` is None, or one of `modes` on a device that has them."""
    if amp_mode is None:
        return
    if amp_mode not in modes:
        raise ValueError(f"expected amp_mode None or one of {modes}, got {amp_mode!r}")
    kind = torch.device(device).type if device is not None else None
    if kind in ("mps", "xla"):
        raise ValueError(f"amp_mode={amp_mode!r} cannot be used with a device of type {kind}; use amp_mode=None")
