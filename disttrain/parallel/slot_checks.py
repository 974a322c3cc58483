"""Refuses user code that would give other bits on another number of ranks, while a step runs its slots.

*Contract*: the forward of a model may change buffers and frozen parameters, because every slot begins with those of
the step (`buffers.py`). It may not change trained parameters: the change would reach only the later slots of the same
rank. The loop over the microbatches must run to its end, because the gradients of the slots are summed there. Each
backward belongs into the loop, where its slot is known, and the model has the parameters for which its gradients were
set up. One rank checks all this, as several do.

*Errors*: ConfigError that names the parameter, in the first steps. RuntimeError after an unfinished loop, from the
optimizer's step, and from the next step's loop if no optimizer of torch stepped.

*Cost*: in the first `CHECKED_STEPS` steps, one pass over all trained parameters for each slot and one more, and a call
of a function for each gradient. Later one call for each step of any optimizer of the process.
"""

import warnings
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from disttrain.errors import ConfigError
from disttrain.parallel.fingerprints import Fingerprints, Versions, fingerprints

CHECKED_STEPS = 2
CHECKED_CALLS = 8
MOVES_BY_MODULE = (
    'fsdp_gather="module": the model\'s forward changes its frozen parameter {}, of which each rank holds a part: make '
    "it a buffer, change it in a handler after the step (Events.ITERATION_COMPLETED), or use "
    'fsdp_gather="step"'
)


class FurtherChecks(Protocol):
    """The checks of a strategy, which run beside those of every run."""

    def slot_starts(self) -> None: ...
    def slot_ends(self) -> None: ...
    def step_ends(self) -> None: ...


class SlotChecks:
    """The checks of one rank; `model` is the bare model."""

    def __init__(self, model: nn.Module, further: Sequence[FurtherChecks] = ()) -> None:
        self._model = model
        self._further = further
        self._steps_left = CHECKED_STEPS
        self._before: Fingerprints = {}
        self._open_step: int | None = None
        self._newest = 0
        self._parameters = {id(parameter) for parameter in model.parameters()}  # those that an optimizer gets
        self._in_slot = self._strayed = False
        weakly = weakref.ref(self)

        def before_gradient(gradients: Any) -> None:
            if (checks := weakly()) is not None and not checks._in_slot:
                checks._strayed = True

        _watch_optimizers(self)
        self._watched = [get_gradient_edge(each).node for each in model.parameters() if each.requires_grad]
        self._watches = [node.register_prehook(before_gradient) for node in self._watched]

    def before_optimizer(self, optimizer: Optimizer) -> None:
        """Run before each step of any optimizer of the process."""
        if self._strayed or self._open_step is not None:
            self._refuse(optimizer)

    def _refuse(self, optimizer: Optimizer) -> None:
        """Raise RuntimeError if an optimizer of this model is about to step with gradients that are not the mean."""
        if not any(id(each) in self._parameters for group in optimizer.param_groups for each in group["params"]):
            return
        if self._open_step is not None:
            raise RuntimeError(f"{_left_open(self._open_step)}. The optimizer steps after the loop, not inside it")
        raise RuntimeError(
            "expected one backward for each microbatch, inside the loop over them, but a backward has added "
            "to the gradients after it, so they are not the mean over the slots. Call backward inside the loop; do not "
            "make a list of the microbatches before it"
        )

    def check_parameters(self) -> None:
        """Raise ConfigError for a parameter that the model did not have when its gradients were set up.

        Called at the start of each step, while parameters that are cut are not gathered.
        """
        if self._parameters.issuperset(map(id, self._model.parameters())):
            return
        for name, parameter in self._model.named_parameters():
            if id(parameter) not in self._parameters:
                raise ConfigError(
                    f"the parameter {name} was put into the model after its gradients were set up, so they would not "
                    "be summed; change the model first, then make SlotGradients and the optimizer"
                )

    def step_starts(self, iteration: int) -> None:
        """Note that the loop of a step begins; RuntimeError if the loop of an earlier step did not run to its end.

        A step that an exception has ended may be tried again.
        """
        if iteration < 1:
            raise ValueError(f"expected the number of the step over the whole run, from 1, got {iteration}")
        if iteration <= self._newest:
            warnings.warn(
                f"step {iteration} comes again after step {self._newest}, so its slots draw the same random numbers as "
                "before; unless the run went back to a checkpoint, count the steps over the whole run, not the epoch",
                UserWarning,
                stacklevel=5,
            )
        self._strayed, self._before = False, {}
        left, self._open_step = self._open_step, iteration
        if left not in (None, iteration):
            raise RuntimeError(f"{_left_open(left)}; after an exception try the same step again")

    def step_ends(self) -> None:
        """Note that the loop has run to its end."""
        self._newest, self._open_step = self._open_step or 0, None
        self._steps_left = max(0, self._steps_left - 1)
        if not self._steps_left and self._watches:
            for watch in self._watches:
                watch.remove()
            self._watches, self._watched = [], []
        for checks in self._further:
            checks.step_ends()

    def step_is_undone(self) -> None:
        """Note that the newest step is done again, after its loop has run to its end."""
        self._newest -= 1

    def slot_starts(self) -> None:
        self._in_slot = True
        if self._steps_left and not self._before:
            self._before = self._fingerprints()
        for checks in self._further:
            checks.slot_starts()

    def slot_ends(self) -> None:
        """Raise ConfigError if the slot has changed a trained parameter."""
        self._in_slot = False
        if self._steps_left:
            now = self._fingerprints()
            check_unchanged(self._before, now)
            self._before = now  # that of the next slot: nothing of the user's runs between the two
        for checks in self._further:
            checks.slot_ends()

    def _fingerprints(self) -> Fingerprints:
        return fingerprints((name, each) for name, each in self._model.named_parameters() if each.requires_grad)


_watching: "weakref.WeakSet[SlotChecks]" = weakref.WeakSet()
_hooks: list[Any] = []
"""The one hook of the process on optimizers. It stays: torch walks through its hooks while one of them runs, and taking
a hook off in that moment, as a garbage collection might, would be an error."""


def _watch_optimizers(checks: SlotChecks) -> None:
    _watching.add(checks)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_any_optimizer))


def _before_any_optimizer(optimizer: Optimizer, arguments: Any, options: Any) -> None:
    for checks in list(_watching):
        checks.before_optimizer(optimizer)


def _left_open(step: int | None) -> str:
    return (
        f"expected the loop over the microbatches of step {step} to run to its end, but it was left before, so "
        "the gradients of its slots were not summed. Do not leave it by `break`; in zip(...) let the "
        "microbatches come first"
    )


class ForwardWatch:
    """The check of parameters for one group that FSDP2 gathers: outside the group's forward, a change is lost.

    `names`: the names, in the group, of the parameters that belong to the group itself.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._calls_left = CHECKED_CALLS
        self._before: Fingerprints = {}

    def forward_starts(self, module: nn.Module, inputs: Any) -> None:
        """Run after FSDP2 has gathered the parameters."""
        if self._calls_left:
            self._before = fingerprints((name, module.get_parameter(name)) for name in self._names)

    def forward_ends(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Run before FSDP2 frees the parameters; ConfigError if the forward has changed one."""
        if self._calls_left:
            self._calls_left -= 1
            now = fingerprints((name, module.get_parameter(name)) for name in self._names)
            for name in self._names:
                if not module.get_parameter(name).requires_grad and now[name] != self._before[name]:
                    raise ConfigError(MOVES_BY_MODULE.format(name))
            check_unchanged(self._before, now)


def check_frozen(before: Versions, after: Versions) -> None:
    """Raise ConfigError for a frozen parameter that moves now, but did not in the first steps."""
    for name, version in before.items():
        if name in after and after[name] != version:
            raise ConfigError(
                f"the model's forward changes its frozen parameter {name}, but did not in the first steps, in which a "
                "run finds out what moves; let it move from the first step on, register it as a buffer, or change it "
                "in a handler after the step (Events.ITERATION_COMPLETED)"
            )


def check_unchanged(before: Fingerprints, after: Fingerprints) -> None:
    """Raise ConfigError for a parameter that the forward has changed."""
    for name, version in before.items():
        if after.get(name) != version:
            raise ConfigError(
                f"the model's forward changes its parameter {name}, so the slots after it would see another model, and "
                "which slots those are depends on the number of ranks. Expected a forward that changes buffers alone: "
                "register it as a buffer, or change it in a handler after the step (Events.ITERATION_COMPLETED)"
            )
