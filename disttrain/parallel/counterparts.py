"""Finds the tensor of this run that corresponds to a tensor of a checkpoint, by its path in the state.

*Contract*: a checkpoint's state has the paths `model.NAME` (`loss.NAME` for a loss with parameters),
`evaluation_point.NAME` (of an optimizer that evaluates at another point than it trains), `optimizer.state.INDEX.KEY`
(with several updates `optimizer.UPDATE.state.INDEX.KEY`) and, for each object that a handler keeps (`Run.keep`),
`kept.OBJECT.PATH`. The counterpart of an optimizer state is its parameter. The counterpart of a kept tensor is the
tensor at the same path of the object's present state. If the object has no such tensor yet (an average that begins with
its first step), the counterpart is the parameter whose name ends the path: `model.NAME` or `loss.NAME`, or the NAME in
the model. A tensor of another shape has no counterpart.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from disttrain.parallel.optimizers import by_prefix

OPTIMIZER_STATE = re.compile(r"(?P<optimizer>optimizer(\.[^.]+)?|kept\.[^.]+)\.state\.(?P<index>\d+)\..+")
"""The path of one tensor of an optimizer's state."""


class Counterparts:
    """The counterparts of a run: its modules by name, its optimizer, and the objects that its handlers keep."""

    def __init__(self, parts: Mapping[str, nn.Module], optimizer: Optimizer, kept: Mapping[str, Any]) -> None:
        self._parameters = dict(parts["model"].named_parameters(remove_duplicate=False))
        self._present: dict[str, Tensor] = {
            f"{part}.{name}": parameter
            for part, module in parts.items()
            for name, parameter in module.named_parameters(remove_duplicate=False)
        }
        self._present |= {f"evaluation_point.{name}": tensor for name, tensor in self._parameters.items()}
        self._optimizers = by_prefix(optimizer)
        for name, kept_object in kept.items():
            if isinstance(kept_object, Optimizer):
                self._optimizers[f"kept.{name}"] = kept_object
            else:
                self._present |= tensors_by_path(kept_object.state_dict(), f"kept.{name}")

    def of(self, path: str, shape: tuple[int, ...]) -> Tensor | None:
        """Return the counterpart of the tensor at `path`; None if there is none of this shape."""
        tensor = self._present.get(path)
        if tensor is None and (match := OPTIMIZER_STATE.fullmatch(path)):
            tensor = self._trained(match["optimizer"], int(match["index"]))
        if tensor is None and path.startswith("kept."):
            known = (self._present.get(end, self._parameters.get(end)) for end in _endings(path))
            tensor = next((each for each in known if each is not None), None)
        return tensor if tensor is not None and tensor.shape == shape else None

    def _trained(self, name: str, index: int) -> Tensor | None:
        """Return an optimizer's parameter by its number in the groups, which a checkpoint may still add to."""
        for group in self._optimizers[name].param_groups if name in self._optimizers else ():
            parameters: list[Tensor] = group["params"]
            if index < len(parameters):
                return parameters[index]
            index -= len(parameters)
        return None


def tensors_by_path(state: Any, path: str) -> dict[str, Tensor]:
    """Return the tensors of a nested state by their dotted paths in a checkpoint; `path` is the state's own."""
    if isinstance(state, Tensor):
        return {path: state}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(state, Mapping):
        items = state.items()
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    tensors: dict[str, Tensor] = {}
    for key, value in items:
        tensors |= tensors_by_path(value, f"{path}.{key}")
    return tensors


def _endings(path: str) -> Iterator[str]:
    """Yield the endings of a dotted path, the longest first."""
    parts = path.split(".")
    return (".".join(parts[start:]) for start in range(1, len(parts)))
