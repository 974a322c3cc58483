"""Loads an optimizer's state bit for bit, with the dtypes that were saved.

*Source*: torch's `Optimizer.load_state_dict` casts the state of every floating-point parameter to the parameter's dtype
(pytorch/pytorch#43706). It would round the float32 masters of bfloat16 weights, moments in uint8, and counts.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state that `optimizer.state_dict()` returned; restore the values that torch changes when it loads."""
    optimizer.load_state_dict(dict(state))
    saved_indices = [index for group in state["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in zip(saved_indices, parameters, strict=True):
        saved, loaded = state["state"].get(index, {}), optimizer.state.get(parameter, {})
        for key, value in saved.items():
            loaded[key] = _as_saved(value, loaded.get(key))


def _as_saved(saved: Any, loaded: Any) -> Any:
    """Return the loaded value if it equals the saved one, otherwise a copy of the saved one on the same device."""
    if isinstance(saved, Tensor):
        if not isinstance(loaded, Tensor) or loaded.dtype == saved.dtype:
            return loaded
        return saved.detach().clone().to(loaded.device)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return {key: _as_saved(value, loaded.get(key)) for key, value in saved.items()}
    if isinstance(saved, list | tuple) and isinstance(loaded, list | tuple) and len(saved) == len(loaded):
        return type(saved)([_as_saved(*pair) for pair in zip(saved, loaded, strict=True)])
    return copy.deepcopy(saved)  # torch's loading turns a string, for example, into a generator
