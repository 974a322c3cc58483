"""The gradients of an update that is under way, so that a resume inside an accumulation window loses none.

*Contract*: a window is the `steps` iterations of one update. Inside it the parameters' `.grad` hold the sum so far. The
engine's state dict holds that sum, from the window's first iteration to its last but one, so whoever saves the engine
saves it. The first iteration after a load gets it back with the same bits. Under DistributedDataParallel each rank has
a sum of its own until the window ends. `gather` brings them together, and on the same number of ranks each gets its own
back.

*Errors*: a UserWarning that says what is lost: at a save for which the ranks' sums were not gathered, and at an
iteration inside a window whose first gradients are not there. ValueError for gradients of another model.

*Cost*: a few comparisons an iteration. A save inside a window copies the gradients to the host, on several ranks those
of all ranks.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

Sums = list[Tensor | None]
"""The `.grad` of each parameter; None where it has none."""


class HoldsWindow(Protocol):
    """The part of an engine that a window knows."""

    window: "AccumulationWindow | None"
    """The window that is open after the newest iteration."""
    loaded_window: Mapping[str, Any] | None
    """The window of a loaded state, until an iteration takes it."""


class AccumulationWindow:
    """The window of one step function, over the parameters of its model and of its optimizer."""

    def __init__(self, steps: int, model: nn.Module, optimizer: Optimizer) -> None:
        self._steps = steps
        self._model = model
        self._optimizer = optimizer
        self._newest = 0
        self._by_rank: list[Sums] | None = None

    def begins(self, engine: HoldsWindow, iteration: int) -> None:
        """Before an iteration: put back the gradients of a loaded state, or warn of those that are not there."""
        loaded, engine.loaded_window = engine.loaded_window, None
        num_before = (iteration - 1) % self._steps
        if loaded is not None:
            if (why := self._misfit(loaded, iteration)) is None:
                self._put_back(loaded)
            else:
                if num_before:
                    self._optimizer.zero_grad()
                warn_of_lost(loaded, why)
        elif num_before and not (engine.window is self and self._newest == iteration - 1):
            if engine.window is not self:
                self._optimizer.zero_grad()  # what the parameters hold is of another run
                self._newest = 0
            begin = max(iteration - num_before, self._newest + 1)
            _warn(begin, iteration - 1, "the loaded state does not hold them, or an exception ended the iteration")
        elif not num_before and engine.window is self and self._newest < iteration:
            first = self._newest - (self._newest - 1) % self._steps
            _warn(first, iteration - 1, "an exception ended the last iteration of their update, which was not made")

    def ends(self, engine: HoldsWindow, iteration: int) -> None:
        """After an iteration: the window is closed, or the engine's state dict has to hold it."""
        self._newest = iteration
        self._by_rank = None
        engine.window = self if iteration % self._steps else None

    def gather(self, all_gather: Callable[[Any], Any]) -> None:
        """Bring the ranks' sums together for the next `state_dict`; every rank calls this after the same iteration."""
        if self._world()[1] > 1:
            self._by_rank = all_gather(self._sums())

    def state_dict(self) -> dict[str, Any]:
        """Return the sums as plain values and tensors, by rank; a UserWarning if they are those of this rank alone."""
        rank, world_size = self._world()
        by_rank = self._by_rank or [self._sums()]
        if len(by_rank) < world_size:
            warnings.warn(
                f"a checkpoint inside an accumulation window holds the gradients of rank {rank} alone, of {world_size} "
                "ranks: a resume loses those of the window. Pass backend=... to Checkpoint and call it on every rank, "
                f"or save where a window ends: Events.ITERATION_COMPLETED(every={self._steps})",
                UserWarning,
                stacklevel=4,
            )
        return {
            "steps": self._steps,
            "iteration": self._newest,
            "world_size": world_size,
            "gradients": by_rank,
        }

    def _misfit(self, loaded: Mapping[str, Any], iteration: int) -> str | None:
        """Return why the loaded sums cannot be used; None if they can be."""
        _, world_size = self._world()
        if loaded["steps"] != self._steps:
            return f"gradient_accumulation_steps was {loaded['steps']} when they were saved, and is {self._steps}"
        if loaded["iteration"] != iteration - 1:
            return f"they are those up to iteration {loaded['iteration']}, and the next iteration is {iteration}"
        if loaded["world_size"] != world_size:
            return f"the window was begun on {loaded['world_size']} ranks, now {world_size}"
        if len(loaded["gradients"]) != world_size:
            return f"the checkpoint holds those of {len(loaded['gradients'])} of {world_size} ranks"
        return None

    def _put_back(self, loaded: Mapping[str, Any]) -> None:
        parameters, sums = self._parameters(), loaded["gradients"][self._world()[0]]
        shapes = [tuple(parameter.shape) for parameter in parameters]
        if len(sums) != len(shapes) or any(
            each is not None and tuple(each.shape) != shape for each, shape in zip(sums, shapes, strict=True)
        ):
            raise ValueError(
                f"the state holds an accumulation window of other parameters: expected {len(shapes)} gradients of the "
                f"parameters' shapes, got {len(sums)}; load it into the trainer of the same model and optimizer"
            )
        for parameter, value in zip(parameters, sums, strict=True):
            parameter.grad = None if value is None else _like(parameter, value)

    def _parameters(self) -> list[Tensor]:
        """Return the parameters of the model, then those that only the optimizer has, each once."""
        groups = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        return list({id(each): each for each in [*self._model.parameters(), *groups]}.values())

    def _sums(self) -> Sums:
        return [None if (grad := parameter.grad) is None else _copy(grad) for parameter in self._parameters()]

    def _world(self) -> tuple[int, int]:
        """Return (rank, world size) of the ranks that have sums of their own: (0, 1) outside of DDP."""
        model = getattr(self._model, "_orig_mod", self._model)  # inside torch.compile
        if not isinstance(model, DistributedDataParallel):
            return 0, 1
        group = model.process_group
        return dist.get_rank(group), dist.get_world_size(group)


def _copy(gradient: Tensor) -> Tensor:
    """Return a copy that the next backward does not change; on the host, since the device may have no room for it."""
    gradient = gradient.detach()
    return gradient.clone() if hasattr(gradient, "to_local") else gradient.to("cpu", copy=True)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a loaded gradient where and as its parameter lies."""
    if hasattr(parameter, "to_local") and not hasattr(value, "to_local"):
        from torch.distributed.tensor import distribute_tensor  # slow to import, and here already

        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)  # type: ignore[attr-defined]
    return value.to(parameter.device, copy=True)


def warn_of_lost(loaded: Mapping[str, Any], why: str) -> None:
    """Warn that the sums of a loaded window are not used."""
    newest: int = loaded["iteration"]
    _warn(newest - newest % loaded["steps"] + 1, newest, why)


def _warn(first: int, last: int, why: str) -> None:
    which = f"iteration {last}" if first == last else f"iterations {first} to {last}"
    warnings.warn(f"the gradients of {which} are lost to their accumulation window: {why}", UserWarning, stacklevel=5)
