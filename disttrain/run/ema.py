"""The exponential moving average (EMA) of the weights: shadow tensors beside the parameters, evaluated in their place.

*Contract*: after each `every_steps`-th step of the optimizer, `shadow = decay * shadow + (1 - decay) * parameter`.
Steps whose update is left out do not count. A shadow begins as its parameter is before the first step that trains it.
So a frozen parameter has none until it is unfrozen, and the average of the model holds its value. One that is frozen
later keeps its shadow, which goes on towards it. Parameters of 16 bits have shadows in float32, because small steps
would be rounded away. Buffers are not averaged: the model's own are used. Under fsdp a shadow is cut as its parameter
is, and the formula treats each element by itself, so shadows have the same bits on any number of ranks. They are kept
by `Run.keep`: checkpoints hold them and the ledger hashes them.

*Errors*: ConfigError on XLA devices, and for an optimizer that evaluates at a point of its own.

*Cost*: the memory of the parameters that are trained, in checkpoints too, and once more during an evaluation; one pass
over them at each update.

*Source*: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging (1992), for averaging; the form
with a decay is that of `torch.optim.swa_utils.get_ema_multi_avg_fn`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disttrain.backend import Backend
from disttrain.config import Config
from disttrain.devices import device_row
from disttrain.engine import Engine, Events
from disttrain.errors import ConfigError
from disttrain.parallel.layout import part_here
from disttrain.run.evaluation_point import has_two_points
from disttrain.run.updates import Updates

EMA = "ema"
"""The name under which a run keeps the average."""


class Ema:
    """The average of the parameters of `model`, whose optimizer steps as `updates` says."""

    def __init__(self, model: nn.Module, updates: Updates, *, decay: float, every_steps: int) -> None:
        self._updates = updates
        self._decay = decay
        self._every_steps = every_steps
        self._parameters: dict[str, nn.Parameter] = {}
        self._names: dict[str, str] = {}
        """For each name of a parameter the first one: tied weights have several."""
        firsts: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            plain = name.replace("_orig_mod.", "")  # the name without torch.compile
            self._parameters[plain] = parameter
            self._names[plain] = firsts.setdefault(id(parameter), plain)
        self.shadows: dict[str, Tensor] = {}
        """The shadow of each parameter that is trained or has been, by its name: "model.0.weight"."""

    def attach(self, engine: Engine) -> None:
        """Begin before each update, and move the shadows after the handlers of the step that came before this one."""
        self._updates.before_update.append(self.begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)

    def begin(self) -> None:
        """Give a shadow to each parameter that is trained from now on."""
        for name, first in self._names.items():
            parameter = self._parameters[name]
            if name == first and name not in self.shadows and parameter.requires_grad:
                self.shadows[name] = _copy_of(parameter)

    @torch.no_grad()
    def update(self, engine: Engine) -> None:
        """Move the shadows towards the parameters, if the optimizer has stepped and its step counts."""
        num_steps = engine.state.iteration - self._updates.num_skipped
        if not self._updates.stepped or num_steps % self._every_steps:
            return
        shadows = [part_here(shadow) for shadow in self.shadows.values()]
        parameters = [part_here(self._parameters[name]) for name in self.shadows]
        ends = [parameter.to(shadow.dtype) for parameter, shadow in zip(parameters, shadows, strict=True)]
        if shadows:
            torch._foreach_lerp_(shadows, ends, 1 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the place of the parameters; afterwards these are bit for bit as before."""
        parameters = {name: self._parameters[name] for name in self.shadows}
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data.copy_(self.shadows[name])
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data.copy_(before[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the shadows by all names of their parameters."""
        return {name: self.shadows[first] for name, first in self._names.items() if first in self.shadows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take copies of the shadows that `state_dict` returned; KeyError for a name that no parameter has."""
        self.shadows = {name: state[name].detach().clone() for name in state if self._names[name] == name}


def _copy_of(parameter: Tensor) -> Tensor:
    copy = parameter.detach().clone()
    return copy.float() if parameter.dtype in (torch.float16, torch.bfloat16) else copy


def build_ema(config: Config, model: nn.Module, optimizer: Optimizer, updates: Updates, backend: Backend) -> Ema | None:
    """Build the average that a config asks for; None without ema.decay."""
    decay = config.ema.decay
    if decay is None:
        return None
    if has_two_points(optimizer):
        raise ConfigError(
            f"ema.decay: expected None with {type(optimizer).__name__}, which averages the weights itself and is "
            f"evaluated at that point, got {decay}; leave it out, or use another optimizer"
        )
    if device_row(backend.device).is_lazy:
        raise ConfigError(
            f"ema.decay: expected None on XLA devices, where it was never tried, got {decay}; leave it out"
        )
    return Ema(model, updates, decay=decay, every_steps=config.ema.every_steps)
