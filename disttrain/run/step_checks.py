"""Checks of what the functions of a config give to each other in a step, in the config's words.

*Contract*: what is right passes unchanged; a loss of the shape [1] becomes one of the shape []. Every rank checks its
own microbatches, in training and in evaluation alike.

*Errors*: ConfigError that names the field, its file and its line.

*Cost*: about a microsecond for each microbatch.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from disttrain.backend.headers import describe_value
from disttrain.config import Config
from disttrain.config.wording import got
from disttrain.engine.supervised import StepFunction, StepResult
from disttrain.errors import ConfigError
from disttrain.run.field_places import field_place
from disttrain.run.value_checks import values_of

_MOST_SHOWN = 6


class CheckedStep(StepFunction):
    """A StepFunction that checks the batch, and what the loss or the forward of the config returns."""

    def __init__(
        self, config: Config, model: nn.Module, loss: Callable[..., Any] | None, step: Callable[..., Any] | None
    ) -> None:
        super().__init__(model, loss, step)
        self.pair = pairs_of(config)
        if loss is not None:
            self.loss_of = checked_loss(config, loss)
        if step is not None:
            self.result_of = checked_forward(config, step)


def pairs_of(config: Config) -> Callable[[Any], Any]:
    """Return a function that returns a batch, if it is a pair (x, y)."""

    def pair(batch: Any) -> Any:
        two = batch
        if not ((type(batch) is list or type(batch) is tuple) and len(batch) == 2):
            two = None if isinstance(batch, Mapping | Tensor | str) else _unpacked(batch)
        if two is not None:
            for name, part in zip("xy", two, strict=True):
                if isinstance(part, Tensor) and part.ndim == 0:
                    raise ConfigError(
                        f"{field_place(config, 'collate')}: expected a batch of several samples, got one number as "
                        f"{name}; keep the batch's dimension first, as torch.stack(samples) does"
                    )
            return two
        raise ConfigError(
            f"{field_place(config, 'train_data')}: expected samples (x, y), got a batch that is {form_of(batch)}; "
            "return pairs, or set forward=(model, batch) -> (loss, outputs) for batches of another form"
        )

    return pair


def _unpacked(batch: Any) -> tuple[Any, Any] | None:
    """Return the two parts of an object that unpacks as a pair; None of every other."""
    try:
        x, y = batch
    except (TypeError, ValueError):
        return None
    return x, y


def checked_forward(config: Config, forward: Callable[..., Any]) -> Callable[[nn.Module, Any], StepResult]:
    """Return the config's `forward`, here `forward`, which must return a loss and outputs, and may return values."""
    checked_values = values_of(config)

    def checked(model: nn.Module, batch: Any) -> StepResult:
        returned = forward(model, batch)
        if not isinstance(returned, tuple | list) or len(returned) not in (2, 3):
            raise ConfigError(
                f"{field_place(config, 'forward')}: expected (loss, outputs), got {form_of(returned)}; return two "
                "things: the loss, and what the metrics are updated with (None without metrics); as a third, a dict "
                "of values for the curves"
            )
        loss, outputs, *values = returned
        return one_number(loss, config, "forward"), outputs, checked_values(values[0]) if values else {}

    return checked


def checked_loss(config: Config, loss: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return the config's `loss`, here `loss`, which must return one number; what it got is noted on its errors."""

    def checked(y_pred: Any, y: Any) -> Tensor:
        try:
            value = loss(y_pred, y)
        except Exception as error:
            error.add_note(f"the loss got y_pred, {form_of(y_pred)}, and y, {form_of(y)}")
            raise
        return one_number(value, config, "loss")

    return checked


def one_number(value: Any, config: Config, field: str) -> Tensor:
    """Return a value that a field's function has returned, a tensor of one number; ConfigError for any other."""
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return value
        if value.numel() == 1:
            return value.reshape(())
    which = "a loss that is " if field == "forward" else ""
    advice = "reduce it, by .mean() or reduction='mean'" if isinstance(value, Tensor) else "return what .mean() gives"
    raise ConfigError(
        f"{field_place(config, field)}: expected {which}a tensor of one number, got {form_of(value)}; {advice}"
    )


def form_of(value: Any) -> str:
    """Return the form of a value in words: `float32[8, 3]`, `a tuple of float32[8, 3] and None`."""
    if isinstance(value, Tensor):
        return describe_value(value)
    if isinstance(value, Mapping):
        return f"{got(value)} with the keys {', '.join(map(repr, [*value][:_MOST_SHOWN]))}"
    if isinstance(value, tuple | list):
        parts = ", ".join(describe_value(part) for part in value[:_MOST_SHOWN])
        return f"a {type(value).__name__} of {len(value)} ({parts}{', ...' if len(value) > _MOST_SHOWN else ''})"
    return got(value)
