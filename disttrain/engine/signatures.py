"""Checks that a callable takes the arguments with which an engine will call it, at the time it is passed in."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def signature_of(function: object, role: str) -> inspect.Signature:
    """Return the signature; ValueError if `function` is not callable or has no signature."""
    if not callable(function):
        raise ValueError(f"{role} must be callable, got {function!r}")
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        raise ValueError(
            f"{role} must have a signature, got {function!r}, which has none; wrap it in a function"
        ) from None


def call_error(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Return why a call with these arguments would fail, or None."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


def check_takes_two(function: object, role: str, names: str) -> None:
    """Raise ValueError unless `function` takes two positional arguments; `names` are their names for the message."""
    reason = call_error(signature_of(function, role), (None, None), {})
    if reason is not None:
        raise ValueError(f"{role} must take two arguments, {names}; {function!r} cannot be called so: {reason}")


def takes_engine(
    handler: Callable[..., Any],
    event: object,
    added: tuple[Sequence[str], Sequence[str]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> bool:
    """Return whether a handler of `event` takes the engine; ValueError if a call fails both with and without it.

    `added` holds the names of the arguments that the event adds: by position, after the engine, and by keyword.
    """
    signature = signature_of(handler, "a handler")
    by_position, by_keyword = added
    positional = [*by_position, *args]
    repeated = sorted(set(by_keyword) & set(kwargs))
    keywords = {**kwargs, **dict.fromkeys(by_keyword)}
    error_with_engine = call_error(signature, ["engine", *positional], keywords)
    if not repeated and error_with_engine is None:
        return True
    if not repeated and call_error(signature, positional, keywords) is None:
        return False
    call = ", ".join(
        ["[engine]", *by_position, *map(repr, args), *(f"{name}={name}" for name in by_keyword)]
        + [f"{name}={value!r}" for name, value in kwargs.items()]
    )
    reason = f"{event} itself passes {', '.join(repeated)}" if repeated else error_with_engine
    raise ValueError(
        f"{event} calls its handlers with ({call}); the handler {handler!r} with the signature {signature} cannot be "
        f"called so: {reason}"
    )
