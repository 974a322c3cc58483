"""The parameters that a run trains, and the groups of its optimizer: handlers may change both while it trains.

*Contract*: a handler may set `requires_grad` and call `run.optimizer.add_param_group` at any time between two steps. A
checkpoint's position holds what differs, by the names of parameters, from the run as it was assembled (its handlers
called, no checkpoint loaded). A resumed run gets it back before any tensor is read, because the state of an optimizer
counts the parameters of its groups. A resume fires STARTED again, and inside an epoch EPOCH_STARTED too: what their
handlers freeze, unfreeze or add then has been done before, so it is undone, or not added twice.

*Errors*: ConfigError, the same on every rank, for a parameter that was unfrozen and that no optimizer has, for a
parameter of the optimizer that is not the model's, and for a checkpoint that names parameters the model lacks.

*Cost*: reads `requires_grad` of every parameter once a step.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn, tensor
from torch.optim import Optimizer

from disttrain.engine import Engine, Events
from disttrain.errors import ConfigError
from disttrain.evidence.ledger import shortened
from disttrain.parallel import Layout
from disttrain.parallel.optimizers import by_prefix

FLAGS, GROUPS = "requires_grad", "param_groups"
"""The keys of a position: {name: requires_grad} of what has changed, and the names in each group if these changed."""


class Freezing:
    """The `requires_grad` of a run's parameters, and the groups of its optimizer, by the names in `model`."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, layout: Layout, *, forgotten: Collection[str] | None = None
    ) -> None:
        """`forgotten`: the trained parameters in no group, if that is a mistake; None if the config left them out."""
        self._named = {name.replace("_orig_mod.", ""): each for name, each in model.named_parameters()}
        """By their names without torch.compile, as in a checkpoint's state."""
        self._optimizer = optimizer
        self._layout = layout
        self._kept: Mapping[str, Any] = {}
        members = {id(each) for group in optimizer.param_groups for each in group["params"]}
        lost = {n for n, each in self._named.items() if each.requires_grad and id(each) not in members}
        self._left_out = lost if forgotten is None else set()
        self._forgotten = forgotten or ()
        self._held: dict[str, bool] = {}
        self._checked: tuple[list[bool], list[int]] | None = None
        self._begin()

    def _begin(self) -> None:
        self._flags_at_start = self._flags()
        # A precision may have put parameters of its own into the optimizer, such as float32 masters.
        known = {id(parameter) for parameter in self._named.values()}
        members = [each for group in self._optimizer.param_groups for each in group["params"]]
        self._has_own = all(id(each) in known for each in members)
        self._groups_at_start = self._groups()

    def _groups(self) -> list[list[str]]:
        """Return the names in each group of the optimizer; none if a precision steps parameters of its own."""
        return names_by_group(self._optimizer, self._named) if self._has_own else []

    def assembled(self, kept: Mapping[str, Any]) -> None:
        """Take what there is now as the start: all handlers have been called. `kept` may hold further optimizers."""
        self._kept = kept
        self._begin()
        if forgotten := [name for name in self._without_optimizer() if name in self._forgotten]:
            raise ConfigError(
                f"optimizer: expected every parameter with requires_grad in a group, but {shortened(forgotten)} would "
                "get a gradient, count in its norm and never be trained; give it a group, or freeze it with "
                "requires_grad_(False)"
            )

    def say_what_is_left_out(self, warn: Callable[[str], None]) -> None:
        """Warn about the parameters that get a gradient and that no optimizer steps, by the config's own choice."""
        if self._has_own and (names := self._without_optimizer()):
            warn(
                f"the optimizer leaves out {shortened(names)}, which get a gradient that counts in its norm, and are "
                "not trained; freeze them with requires_grad_(False) where the model is built"
            )

    def _without_optimizer(self) -> list[str]:
        """Return the names of the parameters with requires_grad that are in no group of an optimizer of the run."""
        optimizers = [self._optimizer, *(each for each in self._kept.values() if hasattr(each, "param_groups"))]
        stepped = {id(each) for one in optimizers for group in one.param_groups for each in group["params"]}
        return [name for name, each in self._named.items() if each.requires_grad and id(each) not in stepped]

    def _flags(self) -> dict[str, bool]:
        return {name: parameter.requires_grad for name, parameter in self._named.items()}

    def position(self) -> dict[str, Any]:
        """Return the changes since the start, for a checkpoint's manifest."""
        groups = self._groups()
        changed = {name: flag for name, flag in self._flags().items() if flag != self._flags_at_start[name]}
        return {FLAGS: changed, **({} if groups == self._groups_at_start else {GROUPS: groups})}

    def tensors(self) -> dict[str, Tensor]:
        """Return the changes since the start as tensors that a ledger can hash, beside the optimizer's state."""
        position = self.position()
        values = {f"{name}.requires_grad": flag for name, flag in position[FLAGS].items()}
        for index, group in enumerate(position.get(GROUPS, ())):
            values |= {f"{name}.group": index for name in group}
        return {f"optimizer.{name.removeprefix('model.')}": tensor(value) for name, value in values.items()}

    def load(self, position: Mapping[str, Any]) -> None:
        """Set what a checkpoint's position holds, from the start on; it may be called again with another position."""
        flags, groups = position.get(FLAGS, {}), position.get(GROUPS, self._groups_at_start)
        if missing := sorted({*flags, *(name for group in groups for name in group)} - set(self._named)):
            raise ConfigError(
                f"the checkpoint says which parameters were frozen, unfrozen or given to the optimizer, but the model "
                f"has no {shortened(missing)}: expected the model with which the run began; restore it, give this run "
                "another name=NAME, or start anew with --fresh"
            )
        self._set_flags({**self._flags_at_start, **flags})
        if self._has_own:
            self._set_groups([[self._named[name] for name in group] for group in groups])

    def _set_flags(self, flags: Mapping[str, bool]) -> None:
        for name, flag in flags.items():
            self._named[name].requires_grad_(flag)

    def _set_groups(self, groups: list[list[Tensor]]) -> None:
        """Give the optimizer groups of these parameters; it loads their hyperparameters and states afterwards."""
        present = self._optimizer.param_groups
        options = {key: value for key, value in present[0].items() if key not in ("params", "param_names")}
        del present[len(groups) :]
        for group, parameters in zip(present, groups, strict=False):
            group["params"] = parameters
        for parameters in groups[len(present) :]:
            self._optimizer.add_param_group({**options, "params": parameters})

    def evaluated(self) -> None:
        """Let what is frozen now stay so: a resumed run may evaluate before the events that `hold` waits for."""
        self._held = self._flags()

    def hold(self, trainer: Engine, warn: Callable[[str], None], *, inside_epoch: bool) -> None:
        """Keep what `load` has set while events fire that fired before the checkpoint; the run is about to go on."""
        self.evaluated()
        optimizer = self._optimizer
        own, add = vars(optimizer).get("add_param_group"), optimizer.add_param_group

        def add_if_new(param_group: dict[str, Any]) -> None:
            given = param_group["params"]
            param_group["params"] = [given] if isinstance(given, Tensor) else list(given)
            present = {id(parameter) for other in optimizer.param_groups for parameter in other["params"]}
            if not all(id(parameter) in present for parameter in param_group["params"]):
                add(param_group)

        def over() -> None:
            if own is None:
                del optimizer.add_param_group
            else:
                optimizer.add_param_group = own  # type: ignore[method-assign]
            changed = [name for name, flag in self._flags().items() if flag != self._held[name]]
            self._set_flags(self._held)
            if changed:
                warn(
                    f"handlers of STARTED or EPOCH_STARTED, which fire again when a run resumes, changed requires_grad "
                    f"of {shortened(changed)}: it is again as the checkpoint holds it"
                )

        optimizer.add_param_group = add_if_new  # type: ignore[method-assign]
        last = Events.EPOCH_STARTED(once=trainer.state.epoch + 1) if inside_epoch else Events.STARTED
        trainer.add_event_handler(last, over)

    def check(self) -> None:
        """Raise ConfigError unless every parameter that gets a gradient is in a group of an optimizer.

        Called before each update; it looks closer before the first one and when something has changed.
        """
        flags = [parameter.requires_grad for parameter in self._named.values()]
        now = flags, [len(group["params"]) for group in self._optimizer.param_groups]
        if now == self._checked or not self._has_own:
            return
        names_by_group(self._optimizer, self._named)
        for optimizer in by_prefix(self._optimizer).values():
            self._layout.check_optimizer(optimizer)
        if lost := [name for name in self._without_optimizer() if name not in self._left_out]:
            raise ConfigError(
                f"expected every parameter with requires_grad in a group of the optimizer, but {shortened(lost)} "
                "would get a gradient and never be trained; where it is unfrozen, call "
                'run.optimizer.add_param_group({"params": [...]}), or freeze it with requires_grad_(False)'
            )
        self._checked = now


def names_by_group(optimizer: Optimizer, named: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of the parameters in each group; ConfigError for a parameter that is not among `named`."""
    names = {id(parameter): name for name, parameter in named.items()}
    seen: set[int] = set()
    for parameter in (each for group in optimizer.param_groups for each in group["params"]):
        if id(parameter) in seen and id(parameter) in names:
            raise ConfigError(
                f"optimizer: {type(optimizer).__name__} has the parameter {names[id(parameter)]} twice, so it would be "
                "stepped twice; leave it out of one place (a tied weight has several names: take it once)"
            )
        seen.add(id(parameter))
        if id(parameter) not in names:
            raise ConfigError(
                f"optimizer: {type(optimizer).__name__} has a parameter of shape {list(parameter.shape)} that belongs "
                "neither to the model nor to the config's loss or forward: it would not be saved, nor be the same on "
                "every rank; make it part of the model, or give the Module that holds it as `loss` or `forward`"
            )
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
