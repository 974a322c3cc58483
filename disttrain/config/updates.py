"""Several updates in one step: `updates=[Update("d", ...), Update("g", ...)]`, as a GAN or an actor and a critic need.

*Contract*: a step runs the updates that are due in their order, each over all slots: forward, backward, the gradients
of its own parameters, its optimizer. An update is due in the steps 1, 1 + every, 1 + 2 * every and so on. A Config
keeps them by their names, in their order.

*Errors*: ConfigError that names the update and its field.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from disttrain.config.annotations import (
    PLAIN_KEY,
    FieldNote,
    Forward,
    OptimizerFactory,
    ParametersOf,
    Positive,
    PositiveFloat,
    ScheduleFactory,
)
from disttrain.config.declaration import Declaration
from disttrain.config.wording import both, got
from disttrain.errors import ConfigError

if TYPE_CHECKING:
    from disttrain.config.fields import Config


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
        super().__init__(**by_position, **values)


def by_name(given: Any) -> Any:
    """Return a list of updates as a dict by their names; ConfigError for other things, and for a name given twice."""
    if isinstance(given, Mapping):
        given = list(given.values())
    if given is None:
        return {}
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


def update_problems(config: "Config") -> Iterator[str]:
    """Yield the problems of a config's updates, each a sentence without a full stop."""
    if not config.updates:
        if config.optimizer is None:
            yield "optimizer: missing; expected (parameters) -> Optimizer"
        return
    for name in config.updates:
        if not PLAIN_KEY.fullmatch(name) or "/" in name:
            yield f"updates: expected names without '.', '=', '/' and spaces, such as 'd', got {got(name)}"
    for field in ("optimizer", "schedule", "grad_clip_norm"):
        if (value := getattr(config, field)) is not None:
            yield (
                f"{field}: expected None with updates, each of which has its own, got {got(value)}; write "
                f"Update(NAME, ..., {field}=...)"
            )
    for field in ("loss", "forward"):
        if config.valid_data is None and (value := getattr(config, field)) is not None:
            yield (
                f"{field}: expected None with updates and without valid_data, got {got(value)}; each Update has a "
                "forward, and this one is for the validation data alone"
            )
    if (least := min(update.every for update in config.updates.values())) > 1:
        yield (
            f"updates: expected one that is due in every step, got every={least} or more for all; leave every out in "
            "one of them"
        )
    not_built: dict[str, tuple[Any, str]] = {
        "global_loss": (config.global_loss, "None"),
        "train_metrics": (config.train_metrics, "none"),
        "compile": (config.compile, "False"),
        "spmd": (config.spmd, "False"),
        "precision": ("" if config.precision != "apex" else "apex", '"fp32", "bf16" or "fp16"'),
        "fsdp_gather": ("" if config.fsdp_gather == "step" else config.fsdp_gather, '"step"'),
    }
    for field, (value, expected) in not_built.items():
        if value:
            shown = both(value) if isinstance(value, Mapping) else got(value)
            yield f"{field}: expected {expected} with updates, together with which it has not been built, got {shown}"
