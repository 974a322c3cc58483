"""Explains an exception of the user's code in one line: where it came from, and what to do if that is known.

*Contract*: the innermost line of the user's own files is the place. If only libraries ran, as with a model made of
torch's layers, it is the field of the config whose part ran. An exception for which there is neither is a defect of
ours, and keeps its traceback.
"""

import re
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from disttrain.config import Config
from disttrain.errors import CodeError, DisttrainError
from disttrain.mistakes import is_mistake, is_of_disttrain, line_of, quoted
from disttrain.run.field_places import code_of, field_place

_ADVICE = (
    (
        r"same dtype|scalar type|Found dtype|expected .* dtype",
        "give the samples and the model one dtype: x.float() for what numpy made, which is float64",
    ),
    (
        r"Target -?\d+ is out of bounds|class values must be smaller|num_classes",
        "classes count from 0, so the model needs one more output than the largest target",
    ),
    (
        r"index out of range in self",
        "an embedding needs more rows than the largest index",
    ),
    (
        r"same device",
        "model and batch are moved by the run; make the model's other tensors buffers (register_buffer), or put them "
        "on x.device",
    ),
    (
        r"does not require grad",
        "compute the loss from parameters that are trained, without .item(), .detach(), torch.no_grad() or argmax",
    ),
    (
        r"must be Tensor, not tuple|'tuple' object has no attribute",
        "the loss takes one tensor: let the model return one, or set forward=(model, batch) -> (loss, outputs)",
    ),
)


def explained(error: BaseException, config: Config) -> BaseException:
    """Return a CodeError for a mistake of the user's code, and every other error as it is."""
    if isinstance(error, DisttrainError) or not is_mistake(error):
        return error
    where = line_of(error) or _part(error, config)
    if where is None:
        return error
    text = str(error)
    advice = next((advice for pattern, advice in _ADVICE if re.search(pattern, text)), None)
    parts = [f"{where}: {quoted(error)}", *getattr(error, "__notes__", ()), *([advice] if advice else [])]
    mistake = CodeError("; ".join(parts))
    mistake.__cause__ = error
    return mistake


def _part(error: BaseException, config: Config) -> str | None:
    """Return the field of the config whose part ran when the exception came, in libraries alone; None if none did."""
    frames = list(_library_frames(error))
    ran = [frame.f_locals.get("self") for frame in frames]
    of_user = [each for each in ran if not type(each).__module__.startswith("disttrain")]  # not the StepFunction
    modules = [each for each in of_user if isinstance(each, nn.Module)]
    codes = [frame.f_code for frame in frames]
    # By identity: a metric overloads ==.
    for field, given in (("loss", config.loss), ("global_loss", config.global_loss)):
        if given is not None and (any(each is given for each in ran) or code_of(given) in codes):
            return field_place(config, field)
    for kind, field in ((LRScheduler, "schedule"), (Optimizer, "optimizer")):
        if any(isinstance(each, kind) for each in ran):
            return field_place(config, field)
    if any(hasattr(each, "dist_sync_fn") for each in modules):
        return field_place(config, "metrics")
    if modules:
        return f"{field_place(config, 'model')}, in its {_name_in(modules)}"
    if any("/torch/autograd/" in frame.f_code.co_filename for frame in frames):
        return f"the backward of {field_place(config, 'forward' if config.loss is None else 'loss')}"
    return None


def _library_frames(error: BaseException) -> Iterator[FrameType]:
    """Yield the frames of libraries that ran inside the last function of disttrain, outermost first."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        if is_of_disttrain(trace.tb_frame.f_code.co_filename):
            frames.clear()
        trace = trace.tb_next
    yield from frames


def _name_in(modules: list[Any]) -> str:
    """Return the innermost module that ran, with its name in the outermost that holds it: `layer 2 (Linear)`."""
    inner = modules[-1]
    for outer in modules:
        for name, module in outer.named_modules():
            if module is inner and name:
                return f"module {name} ({type(inner).__name__})"
    return type(inner).__name__
