"""Refuses, in the first steps, a forward that fsdp_gather="module" cannot run alike on any number of ranks.

*Contract*: where each rank has one slot, FSDP2 gathers the parameters of a group (`groups.py`) for the forward of that
group's module and frees them after it; a backward hook on the group's output sends its gradients. So such a run may use
a parameter only inside the forward of its group, each slot calls the same groups in the same order, a gradient arrives
once in a backward, and nothing takes a parameter's place. One rank checks all this, although it cuts nothing. With any
gather, nothing may hang on a parameter.

*Errors*: ConfigError that names the parameter or the module.

*Cost*: hooks on the groups and on their parameters, which are taken off after the first `CHECKED_STEPS` steps.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from disttrain.errors import ConfigError
from disttrain.parallel.slot_checks import CHECKED_STEPS

ADVICE = 'or use fsdp_gather="step", which holds all parameters during a step'
OTHER_CALLS = (
    'fsdp_gather="module": expected every slot to call the same modules in the same order, but where one calls {}, '
    "another calls {}; call the same, " + ADVICE
)
OWN = __name__.partition(".")[0]
AT_THE_END = -1
"""Instead of a group's number: the forward has come to its end."""


class ShardChecks:
    """The checks of one rank.

    `groups`: the modules that are gathered, the whole model last. `own`: for each, its own parameters by name, as
    autograd sees them (under FSDP2 the gathered ones). With a `process_group`, ranks that each run one slot compare
    each call before any of them gathers parameters for it.
    """

    def __init__(
        self,
        groups: Sequence[nn.Module],
        own: Sequence[Mapping[str, Tensor]],
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._own = own
        self._group = process_group
        places = {module: name for name, module in groups[-1].named_modules()}
        self._names = [f"{type(each).__name__.removeprefix('FSDP')} ({places[each] or 'all'})" for each in groups]
        self._steps_left = CHECKED_STEPS
        self._calls: list[int] = []
        self._in_slot = False
        self._first_calls: list[int] | None = None
        self._fired: Counter[tuple[int, str]] = Counter()
        self._hooks: list[Any] = []
        for number, (group, parameters) in enumerate(zip(groups, own, strict=True)):
            self._hooks.append(group.register_forward_pre_hook(partial(self._called, number), prepend=True))
            for name, parameter in parameters.items():
                if parameter.requires_grad:
                    fires = partial(self._fires, (number, name))
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(fires))  # type: ignore[no-untyped-call]
        self._hooks.append(groups[-1].register_forward_hook(self._returns))

    def _returns(self, model: nn.Module, inputs: Any, output: Any) -> None:
        self._compare(AT_THE_END)

    def _compare(self, number: int) -> None:
        """Raise ConfigError unless all ranks call the same group now, or have all come to the end of the forward."""
        if self._group is None or self._group.size() == 1 or not self._in_slot:
            return
        mine = torch.tensor([number], device=next(iter(self._own[-1].values()), torch.empty(0)).device)
        by_rank = [torch.empty_like(mine) for _ in range(self._group.size())]
        dist.all_gather(by_rank, mine, group=self._group)
        numbers = [int(each) for each in by_rank]
        if len(set(numbers)) > 1:
            names = ["none" if each == AT_THE_END else self._names[each] for each in numbers]
            raise ConfigError(OTHER_CALLS.format(names[0], next(name for name in names if name != names[0])))

    def _called(self, number: int, group: nn.Module, inputs: Any) -> None:
        self._compare(number)
        self._calls.append(number)
        for name in self._own[number]:
            if not _has(group, name):
                raise ConfigError(
                    f'fsdp_gather="module": the parameter {name} of {self._names[number]} was replaced for a call '
                    f"(functional_call, or a parametrization of your own), but it is gathered by its place; {ADVICE}"
                )

    def _fires(self, key: tuple[int, str], parameter: Tensor) -> None:
        self._fired[key] += 1

    def slot_starts(self) -> None:
        self._calls = []
        self._fired.clear()
        self._in_slot = True  # and not in an evaluation, where each rank calls the model as often as it likes

    def slot_ends(self) -> None:
        """Raise ConfigError for what the slot has done that sharded parameters do not allow."""
        self._in_slot = False
        if not self._hooks:
            return
        called = set(self._calls)
        for (number, name), count in self._fired.items():
            if count > 1:
                raise ConfigError(
                    f'fsdp_gather="module": the gradient of {name} arrives in {count} parts in one slot, but is sent '
                    "when the first has arrived; use torch.utils.checkpoint with use_reentrant=False and one backward, "
                    f"{ADVICE}"
                )
            if number not in called:
                raise ConfigError(
                    f'fsdp_gather="module": the parameter {name} of {self._names[number]} is used outside the forward '
                    f"of that module, where it is not gathered; call the module itself, {ADVICE}"
                )
        if self._first_calls is None:
            self._first_calls = self._calls
        if self._calls != self._first_calls:
            pairs = zip_longest(self._first_calls, self._calls, fillvalue=AT_THE_END)
            there, here = next(pair for pair in pairs if pair[0] != pair[1])
            names = ["none" if number == AT_THE_END else self._names[number] for number in (there, here)]
            raise ConfigError(OTHER_CALLS.format(*names))

    def step_ends(self) -> None:
        self._steps_left -= 1
        self._first_calls = None
        if self._steps_left <= 0:
            self.close()

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


class HookChecks:
    """Refuses, in the first steps, hooks that were put on parameters after the model was built.

    `seen`: all parameters by name, as user code sees them between steps.
    """

    def __init__(self, seen: Mapping[str, Tensor]) -> None:
        self._seen = seen
        self._steps_left = CHECKED_STEPS

    def slot_starts(self) -> None:
        if self._steps_left:
            check_no_hooks(self._seen)

    def slot_ends(self) -> None:
        return

    def step_ends(self) -> None:
        self._steps_left = max(0, self._steps_left - 1)


def check_no_hooks(named: Mapping[str, Tensor]) -> None:
    """Raise ConfigError for a parameter with a hook, which would be lost when the parameter is cut."""
    for name, parameter in named.items():
        hooks = parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)
        if any(own_module(hook) != OWN for each in hooks for hook in (each or {}).values()):
            raise ConfigError(
                f'strategy="fsdp": the parameter {name} has a hook (register_hook), but autograd sees gathered copies '
                'of parameters, which have none; change the gradient in a hook of the optimizer, or use strategy="ddp"'
            )


def own_module(hook: Any) -> str:
    """Return the package in which a hook was written."""
    function = hook.func if isinstance(hook, partial) else hook
    return str(getattr(function, "__module__", "")).partition(".")[0]


def _has(group: nn.Module, name: str) -> bool:
    """Return whether a parameter lies at its place in the group."""
    owner, _, attribute = name.rpartition(".")
    return isinstance(getattr(group.get_submodule(owner), attribute, None), nn.Parameter)
