"""Several updates in one step: `updates=[Update("d", ...), Update("g", ...)]`, as a GAN or an actor and a critic need.

*Contract*: a step runs the updates that are due in their order, each over all slots: forward, backward, the gradients
of its own parameters, its optimizer. An update is due in the steps 1, 1 + every, 1 + 2 * every and so on. A Config
keeps them by their names, in their order.

*Errors*: ConfigError that names the update and its field.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import ValidationInfo
from pydantic_core import PydanticCustomError

from disttrain.config.annotations import (
    FieldNote,
    Forward,
    OptimizerFactory,
    ParametersOf,
    Positive,
    PositiveFloat,
    ScheduleFactory,
)
from disttrain.config.declaration import Declaration
from disttrain.config.wording import got
from disttrain.errors import ConfigError


class Update(Declaration):
    """One of several updates of a step; its fields may be given by position, in their order."""

    prefix: ClassVar[str] = "updates: "
    name: Annotated[str, FieldNote()]
    """The name of the update, such as "d". Its losses are called d/loss, its gradient's norm d/grad_norm."""
    parameters: Annotated[ParametersOf, FieldNote(takes="(model) -> parameters")]
    """Returns the parameters that this update trains, such as those of a part of the model."""
    forward: Annotated[Forward, FieldNote(takes="(model, batch) -> (loss, outputs[, values])")]
    """Computes the loss of a microbatch, as a Config's `forward` does."""
    optimizer: Annotated[OptimizerFactory, FieldNote(takes="(parameters) -> Optimizer", asks=("model",))]
    """Builds the optimizer of these parameters."""
    schedule: Annotated[ScheduleFactory | None, FieldNote(takes="(optimizer, total_steps) -> LRScheduler")] = None
    """Builds the schedule of the learning rate, which steps after each step of this optimizer. `total_steps` counts the
    steps in which the update is due. None: no schedule."""
    every: Annotated[Positive, FieldNote("steps")] = 1
    """The update is due in the steps 1, 1 + every, 1 + 2 * every and so on."""
    grad_clip_norm: Annotated[PositiveFloat | None, FieldNote()] = None
    """The largest norm of this update's gradient. A larger gradient is scaled down to it. None: no limit."""

    def __init__(self, *given: Any, **values: Any) -> None:
        names = list(type(self).model_fields)
        if len(given) > len(names):
            raise ConfigError(f"updates: expected Update({', '.join(names)}), got {len(given)} values by position.")
        by_position = dict(zip(names, given, strict=False))
        if twice := sorted(by_position.keys() & values.keys()):
            raise ConfigError(f"updates: expected {twice[0]} of an Update once, got it by position and by name.")
        fields = {**by_position, **values}
        try:
            super().__init__(**fields)
        except ConfigError as error:
            if not isinstance(name := fields.get("name"), str):
                raise
            raise ConfigError(str(error).replace(self.prefix, f"updates.{name}.")) from None


def updates_by_name(given: Any) -> Any:
    """Return a list of updates as a dict by their names; ConfigError for other things, and for a name given twice."""
    if isinstance(given, Mapping):
        given = list(given.values())
    if given is None:
        return None  # which pydantic refuses
    wanted = 'updates: expected a list such as [Update("d", ...), Update("g", ...)]'
    if not isinstance(given, Sequence) or not all(isinstance(each, Update) for each in given):
        other = (
            next((each for each in given if not isinstance(each, Update)), given) if isinstance(given, list) else given
        )
        raise ConfigError(f"{wanted}, got {got(other)}.")
    names = [each.name for each in given]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{wanted} with a name of its own for each, got {twice[0]!r} twice.")
    return dict(zip(names, given, strict=True))


def needed_without_updates(optimizer: Any, info: ValidationInfo) -> Any:
    """Return the optimizer of a Config; a missing field if there is neither an optimizer nor updates."""
    if optimizer is None and (info.data or {}).get("updates") == {}:
        raise PydanticCustomError("missing", "neither an optimizer nor updates")
    return optimizer
