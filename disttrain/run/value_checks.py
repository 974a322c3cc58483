"""Checks of the values that a config's forward returns beside the loss.

*Contract*: what is right passes with its graph cut off, so it is neither trained nor kept alive. A tensor of one number
becomes one of the shape [].

*Errors*: ConfigError that names the value, with the file and line of the forward.

*Cost*: a microsecond or two for each value of a microbatch.
"""

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NoReturn

from torch import Tensor

from disttrain.backend.headers import describe_value
from disttrain.config import Config
from disttrain.config.annotations import PLAIN_KEY
from disttrain.config.checks import OF_EVERY_LINE
from disttrain.config.wording import got
from disttrain.errors import ConfigError
from disttrain.handlers.values import Number, Values
from disttrain.run.field_places import field_place


def values_of(config: Config) -> Callable[[Any], Values]:
    """Return a function that checks the values of a microbatch: a dict from names to numbers or (sum, weight)."""
    known: set[str] = set()

    def checked(values: Any) -> Values:
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{field_place(config, 'forward')}: expected (loss, outputs, values) with a dict of name: number as "
                f'values, got {describe_value(values)}; return a dict such as {{"ce": ce}}, or two things alone'
            )
        for name in values:
            if name not in known:
                _check_name(config, name)
                known.add(name)
        return {name: _checked(config, name, value) for name, value in values.items()}

    return checked


def _check_name(config: Config, name: Any) -> None:
    place = field_place(config, "forward")
    if not isinstance(name, str) or not PLAIN_KEY.fullmatch(name):
        raise ConfigError(
            f"{place}: expected names of values without '.', '=' and spaces, such as 'ce', got {got(name)}"
        )
    if name in OF_EVERY_LINE or name in config.metrics or name in config.train_metrics:
        owner = "a part of every line of the curves" if name in OF_EVERY_LINE else "a metric"
        raise ConfigError(f"{place}: expected values with names of their own, got {name!r}, which is that of {owner}")


def _checked(config: Config, name: str, value: Any) -> Number | tuple[Number, Number]:
    if isinstance(value, tuple | list):
        if len(value) == 2:
            return _number(config, name, value[0]), _number(config, name, value[1])
        _refuse(config, name, value)
    return _number(config, name, value)


def _number(config: Config, name: str, value: Any) -> Number:
    if type(value) is Tensor and value.ndim == 0 and not value.is_complex():  # as nearly all are
        return value.detach()
    if hasattr(value, "to_local"):
        raise ConfigError(
            f"{field_place(config, 'forward')}: the value {name!r} is made of a parameter of which each rank holds a "
            "part; expected what the model's forward has returned, or use fsdp_gather='step'"
        )
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.detach().reshape(())
    if isinstance(value, Real):
        return float(value)
    return _refuse(config, name, value)


def _refuse(config: Config, name: str, value: Any) -> NoReturn:
    form = f"a {type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else describe_value(value)
    advice = "reduce it, by .mean()" if isinstance(value, Tensor) else "return a mean over the batch"
    raise ConfigError(
        f"{field_place(config, 'forward')}: expected the value {name!r} to be one number or a pair (sum, weight), got "
        f"{form}; {advice}"
    )
