"""The optimizers of a run with several updates, as one object where a run has one optimizer.

*Contract*: each parameter belongs to one optimizer. The groups and the state are those of all, in the order of the
updates. `state_dict` holds the state of each under its name, so a checkpoint has the paths
`optimizer.NAME.state.INDEX.KEY`.

*Errors*: ConfigError for a group that is added: the groups stay as the optimizers were built.
"""

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor
from torch.optim import Optimizer

from disttrain.errors import ConfigError
from disttrain.parallel.optimizer_state import load_optimizer


class Optimizers:
    """Several optimizers by name, which have no parameter in common."""

    def __init__(self, by_name: Mapping[str, Optimizer]) -> None:
        self.by_name = dict(by_name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, in their order."""
        return [group for optimizer in self.by_name.values() for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        """The states of all parameters."""
        return {parameter: state for one in self.by_name.values() for parameter, state in one.state.items()}

    def add_param_group(self, param_group: dict[str, Any]) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(
            "run.optimizer.add_param_group: expected one optimizer, got those of several updates, whose groups stay as "
            "they were built; give the parameters to an Update in the cfg.py"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all, as a handler may."""
        for optimizer in self.by_name.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.by_name.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, optimizer in self.by_name.items():
            load_optimizer(optimizer, state[name])


def by_prefix(optimizer: Any) -> dict[str, Optimizer]:
    """Return each optimizer by the beginning of its paths: "optimizer", or "optimizer.NAME" for one of several."""
    if isinstance(optimizer, Optimizers):
        return {f"optimizer.{name}": each for name, each in optimizer.by_name.items()}
    return {"optimizer": optimizer}
