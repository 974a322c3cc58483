"""Steps an optimizer that looks across a parameter (Muon, Adafactor) over parameters that are cut over the ranks.

*Contract*: the bits of a step over whole parameters. Each parameter has an owner, a function of the parameters' sizes
and the number of ranks. The owner gets the parameter, its gradient and its state whole, steps them, and sends the parts
back. So each parameter is stepped once, whole, and nothing of it stays on the owner. Between two steps parameters and
states are cut as for any optimizer: a state of its parameter's shape is cut as the parameter is, any other is the same
on every rank. Checkpoints, hashes and averages know no difference.

The optimizer must step each parameter by itself and draw no random number (`run/optimizer_checks.py` tries that).

*Errors*: DisttrainError on every rank if the values of the optimizer's groups differ after a step.

*Cost*: a step sends the parameters, gradients and states of a rank's 1/W to their owners, and parameters and states
back. During the step a rank holds about 1/W of all of them a second time. States that are not cut (row and column
means, preconditioners) are sent to every rank, as objects.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten

from disttrain.errors import DisttrainError
from disttrain.parallel.owners import Form, assembled, owners_of, spread

OptimizerState = dict[Any, Any]


@dataclass(frozen=True)
class _Cut:
    """Instead of a tensor of the parameter's shape, in what is sent of a state."""

    dtype: torch.dtype


@dataclass(frozen=True)
class _Same:
    """A tensor that is the same on every rank, in what is sent of a state."""

    values: Tensor
    on_host: bool


class WholeSteps:
    """Replaces `optimizer.step` by one over whole parameters.

    The parameters are cut over the ranks of `group`. `like(parameter, part)` returns the DTensor of this rank's part of
    a tensor that is cut as the parameter is.
    """

    def __init__(self, optimizer: Optimizer, group: ProcessGroup, like: Callable[[Tensor, Tensor], Any]) -> None:
        self._optimizer = optimizer
        self._group = group
        self._like = like
        self._step = optimizer.step
        # A bound method, because a schedule wraps the function of one.
        optimizer.step = MethodType(lambda _, *args, **kwargs: self.step(*args, **kwargs), optimizer)  # type: ignore[method-assign]

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Step once, as the optimizer's own `step` does. A collective."""
        cut = [each for group in self._optimizer.param_groups for each in group["params"] if each.grad is not None]
        owners = owners_of([parameter.numel() for parameter in cut], self._group.size())
        with torch.no_grad():
            parameters, states = self._taken(cut, owners)
        result = self._stepped(cut, parameters, states, args, kwargs)
        with torch.no_grad():
            self._give_back(cut, owners, parameters, states)
        return result

    def _taken(
        self, cut: Sequence[Tensor], owners: Sequence[int]
    ) -> tuple[dict[int, nn.Parameter], dict[int, OptimizerState]]:
        """Return this rank's own parameters with their gradients, and their states, all whole, by number."""
        tensors: dict[int, Tensor] = {}
        owner_of: dict[int, int] = {}
        places: dict[int, tuple[list[Any], Any]] = {}
        for number, parameter in enumerate(cut):
            leaves, form = tree_flatten(self._optimizer.state.get(parameter, {}))
            assert parameter.grad is not None
            for tensor in (parameter, parameter.grad, *filter(_is_cut, leaves)):
                owner_of[len(tensors)] = owners[number]
                tensors[len(tensors)] = tensor
            places[number] = leaves, form
        wholes = iter(assembled(tensors, owner_of, self._group).values())  # in the order in which they were given
        parameters, states = {}, {}
        for number, (leaves, form) in places.items():
            if owners[number] == self._group.rank():
                parameters[number] = nn.Parameter(next(wholes), requires_grad=True)
                parameters[number].grad = next(wholes)
                states[number] = tree_unflatten([next(wholes) if _is_cut(leaf) else leaf for leaf in leaves], form)
        return parameters, states

    def _stepped(
        self,
        cut: Sequence[Tensor],
        parameters: Mapping[int, nn.Parameter],
        states: dict[int, OptimizerState],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Step this rank's own parameters; `states` holds their new states afterwards."""
        optimizer, numbers = self._optimizer, {id(parameter): number for number, parameter in enumerate(cut)}
        present, given = optimizer.state, [group["params"] for group in optimizer.param_groups]
        optimizer.state = defaultdict(dict, {parameters[number]: state for number, state in states.items() if state})
        try:
            for group in optimizer.param_groups:
                own = [numbers[id(parameter)] for parameter in group["params"] if id(parameter) in numbers]
                group["params"] = [parameters[number] for number in own if number in parameters]
            result = self._step(*args, **kwargs)
            for number, parameter in parameters.items():
                states[number] = dict(optimizer.state.get(parameter, {}))
        finally:
            for group, before in zip(optimizer.param_groups, given, strict=True):
                group["params"] = before
            optimizer.state = present
        return result

    def _give_back(
        self,
        cut: Sequence[Tensor],
        owners: Sequence[int],
        parameters: Mapping[int, nn.Parameter],
        states: Mapping[int, OptimizerState],
    ) -> None:
        """Send the parts of this rank's own parameters and states to all; take those of the others."""
        mine = {number: _described(state, cut[number].shape) for number, state in states.items()}
        described: dict[int, OptimizerState] = {}
        values = []
        for of_rank, of_groups in self._gathered((mine, _plain_values(self._optimizer))):
            described |= of_rank
            values.append(of_groups)
        if any(each != values[0] for each in values):
            raise DisttrainError(
                f"{type(self._optimizer).__name__} has other values in its groups on some ranks after a step over some "
                'of the parameters; expected values that depend on the number of steps alone: use strategy="ddp"'
            )
        forms: dict[int, Form] = {}
        owner_of: dict[int, int] = {}
        wholes: dict[int, Tensor] = {}
        for number, parameter in enumerate(cut):
            cut_leaves = [leaf for leaf in tree_flatten(described[number])[0] if isinstance(leaf, _Cut)]
            own: Iterator[Tensor] = iter(())
            if number in states:
                shape = parameter.shape
                own = iter([parameters[number].detach(), *_of_shape(tree_flatten(states[number])[0], shape)])
            for dtype in (parameter.dtype, *(leaf.dtype for leaf in cut_leaves)):
                if number in states:
                    wholes[len(forms)] = next(own)
                owner_of[len(forms)] = owners[number]
                forms[len(forms)] = tuple(parameter.shape), dtype
        device = cut[0].device if cut else torch.device("cpu")
        parts = spread(wholes, forms, owner_of, self._group, device)
        in_order = iter([parts[index] for index in range(len(forms))])
        for number, parameter in enumerate(cut):
            local: Any = parameter.detach()
            local.to_local().copy_(next(in_order))
            self._take_state(parameter, described[number], in_order)

    def _take_state(self, parameter: Tensor, described: OptimizerState, parts: Iterator[Tensor]) -> None:
        """Write the new state of a parameter, into the tensors that it has where their form is the same."""
        if not described and parameter not in self._optimizer.state:
            return
        before = dict(tree_flatten_with_path(self._optimizer.state.get(parameter, {}))[0])
        leaves, form = tree_flatten_with_path(described)
        new = [self._leaf(parameter, leaf, before.get(path), parts) for path, leaf in leaves]
        self._optimizer.state[parameter] = tree_unflatten(new, form)

    def _leaf(self, parameter: Tensor, leaf: Any, old: Any, parts: Iterator[Tensor]) -> Any:
        if isinstance(leaf, _Cut):
            part = next(parts)
            if _is_cut(old) and old.dtype == leaf.dtype:
                old.to_local().copy_(part)
                return old
            return self._like(parameter, part.clone())
        if isinstance(leaf, _Same):
            values = leaf.values if leaf.on_host else leaf.values.to(parameter.device)
            if isinstance(old, Tensor) and _form(old) == _form(values):
                return old.copy_(values)
            return values
        return leaf

    def _gathered(self, mine: Any) -> list[Any]:
        by_rank: list[Any] = [None] * self._group.size()
        dist.all_gather_object(by_rank, mine, group=self._group)
        return by_rank


def _is_cut(leaf: Any) -> bool:
    return hasattr(leaf, "to_local")


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _of_shape(leaves: Sequence[Any], shape: torch.Size) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.shape == shape]


def _described(state: OptimizerState, shape: torch.Size) -> OptimizerState:
    """Return a state with a `_Cut` for each tensor of the parameter's shape, and the others on the host."""

    def described(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.shape == shape:
            return _Cut(leaf.dtype)
        return _Same(leaf.detach().cpu(), leaf.device.type == "cpu")

    described_state: OptimizerState = tree_map(described, state)
    return described_state


def _plain_values(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in group.items() if isinstance(value, bool | int | float | str)}
        for group in optimizer.param_groups
    ]
