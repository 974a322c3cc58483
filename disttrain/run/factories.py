"""Calls the factories of a Config."""

import traceback
from collections.abc import Callable
from typing import Any

from disttrain.errors import ConfigError, DisttrainError


def build(what: str, factory: Callable[..., Any], *args: Any) -> Any:
    """Call a factory of the config; whatever it raises becomes a ConfigError that names the place."""
    try:
        return factory(*args)
    except DisttrainError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{what} raised {type(error).__name__}: {error} ({place.filename}, line {place.lineno}, in {place.name})"
        ) from error
