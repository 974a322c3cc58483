"""Whether a callable can be called as an engine will call it; asked when it is handed over, not when it is needed."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def signature_of(function: object, role: str) -> inspect.Signature:
    """Return the signature; ValueError if `function` is not callable, or does not tell how."""
    if not callable(function):
        raise ValueError(f"{role} must be callable, got {function!r}")
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        raise ValueError(
            f"{role} must say which arguments it takes, and {function!r} does not; wrap it in a function"
        ) from None


def refusal(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Return why a call with these arguments fails, or None when it is fine."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


def check_takes_two(function: object, role: str, names: str) -> None:
    """ValueError unless `function` can be called with two positional arguments, which are `names`."""
    why = refusal(signature_of(function, role), (None, None), {})
    if why is not None:
        raise ValueError(f"{role} is called with two arguments, {names}; {function!r} cannot be: {why}")


def takes_engine(
    handler: Callable[..., Any],
    event: object,
    added: tuple[Sequence[str], Sequence[str]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> bool:
    """Return whether a handler of `event` is passed the engine; ValueError if it fits neither with nor without.

    `added` names what the event passes besides: by position, after the engine, and by keyword.
    """
    signature = signature_of(handler, "a handler")
    by_position, by_keyword = added
    positional = [*by_position, *args]
    repeated = sorted(set(by_keyword) & set(kwargs))
    with_engine = refusal(signature, ["engine", *positional], {**kwargs, **dict.fromkeys(by_keyword)})
    if not repeated and with_engine is None:
        return True
    if not repeated and refusal(signature, positional, {**kwargs, **dict.fromkeys(by_keyword)}) is None:
        return False
    call = ", ".join(
        ["[engine]", *by_position, *map(repr, args), *(f"{name}={name}" for name in by_keyword)]
        + [f"{name}={value!r}" for name, value in kwargs.items()]
    )
    why = f"{event} itself passes {', '.join(repeated)}" if repeated else with_engine
    raise ValueError(
        f"{event} calls its handlers as ({call}); {handler!r}, whose signature is {signature}, cannot be: {why}"
    )
