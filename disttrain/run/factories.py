"""Calls the factories of a Config."""

from collections.abc import Callable
from typing import Any

from disttrain.config import Config
from disttrain.config.wording import got
from disttrain.errors import ConfigError, DisttrainError
from disttrain.mistakes import may_pass, placed
from disttrain.run.field_places import field_place

_WRONG_PATHS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def build(what: str, factory: Callable[..., Any], *args: Any) -> Any:
    """Call a factory of the config; what it raises becomes a ConfigError that names the place.

    *Errors*: DisttrainError, after which a launcher starts the run again, for a failure that may pass. A path that is
    not there does not pass: nothing has begun yet, and a person is near.
    """
    try:
        return factory(*args)
    except DisttrainError:
        raise
    except Exception as error:
        passes = may_pass(error) and not isinstance(error, _WRONG_PATHS)
        raise (DisttrainError if passes else ConfigError)(f"{what} raised {placed(error)}") from error


def built(config: Config, field: str, kind: type, *args: Any) -> Any:
    """Call the factory of a field as `build` does; ConfigError unless it returns a `kind`."""
    made = build(field, getattr(config, field), *args)
    if not isinstance(made, kind):
        expected = f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
        raise ConfigError(f"{field_place(config, field)}: expected a function that returns {expected}, got {got(made)}")
    return made
