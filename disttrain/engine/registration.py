"""A handler on an event: how it is called and when it is next due.

*Contract*: nothing here refers to the engine, so an engine is freed by reference counting alone.
*Cost*: each handler holds the next iteration at which its filter can pass (`due`), each event the smallest of these.
"""

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from disttrain.engine.events import NEVER, Event, EventFilter, Events, NumericFilter
from disttrain.engine.signatures import takes_engine

ALWAYS = -1
"""A `due` before any iteration: check the filter at each firing."""
REMOVED = NEVER + 1
"""A `due` after everything, even after the position of an event fired by hand: the handler is removed."""

_ADDED_ARGUMENTS: dict[Event, tuple[tuple[str, ...], tuple[str, ...]]] = {
    Events.EXCEPTION_RAISED: (("exception",), ()),
    Events.TERMINATE_SINGLE_EPOCH: ((), ("iter_counter",)),
}
"""The arguments that an event adds: by position, after the engine, and by keyword."""


class OwnMethod:
    """A handler that is a method of the engine it is on. It does not keep the engine alive."""

    __slots__ = ("engine", "function")

    def __init__(self, method: MethodType) -> None:
        self.engine = weakref.ref(method.__self__)
        self.function = method.__func__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.engine(), *args, **kwargs)

    def __eq__(self, other: object) -> bool:
        method = MethodType(self.function, self.engine())
        return method == (MethodType(other.function, other.engine()) if isinstance(other, OwnMethod) else other)

    def __hash__(self) -> int:
        return hash(self.function)

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnMethod, (MethodType(self.function, self.engine()),)


class Registration:
    """A handler on one event: how it is called, and the next iteration at which its filter can pass.

    `following` maps a value to the next one that passes, where the filter knows it. `bare`: the handler is called with
    the engine and nothing else.
    """

    __slots__ = (
        "__weakref__",
        "args",
        "bare",
        "due",
        "filter",
        "following",
        "function",
        "kwargs",
        "takes_engine",
    )

    def __init__(
        self,
        event: Event,
        function: Callable[..., Any],
        event_filter: EventFilter | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        engine: object,
    ) -> None:
        self.function = function
        if isinstance(function, MethodType) and function.__self__ is engine:
            self.function = OwnMethod(function)
        self.filter = event_filter
        self.following = event_filter.following if isinstance(event_filter, NumericFilter) else None
        self.args = args
        self.kwargs = kwargs
        self.takes_engine = takes_engine(function, event, _ADDED_ARGUMENTS.get(event, ((), ())), args, kwargs)
        self.bare = self.takes_engine and not args and not kwargs and event not in _ADDED_ARGUMENTS
        self.due = ALWAYS


class HandlerList:
    """A registered event with its handlers.

    `due`: no handler has to be called at an iteration below it. `by_iteration`: the loop itself fires the event, and
    its filters compare with `state.iteration`. That rises from one firing to the next, so `due` can be known ahead.
    `firing`: the number of firings under way. `stale`: the list still holds removed handlers.
    """

    __slots__ = ("by_iteration", "due", "event", "firing", "registrations", "stale")

    def __init__(self, event: Event) -> None:
        self.event = event
        self.registrations: list[Registration] = []
        self.by_iteration = False
        self.firing = 0
        self.stale = False
        self.due = NEVER

    def add(self, registration: Registration) -> None:
        """Append a handler; a firing under way still calls it."""
        self.registrations.append(registration)
        self.due = ALWAYS

    def remove(self, handler: Callable[..., Any]) -> bool:
        """Remove every copy of `handler`; return whether there was one."""
        copies = [registration for registration in self._present() if registration.function == handler]
        for registration in copies:
            registration.due = REMOVED
        self.stale = self.stale or bool(copies)
        if not self.firing:
            self.sweep()
        return bool(copies)

    def sweep(self) -> None:
        """Drop the removed handlers; not during a firing, which would then skip a handler."""
        self.registrations = self._present()
        self.stale = False
        self.due = ALWAYS  # not the smallest of the rest: the event may have been woken

    def wake(self) -> None:
        """Forget which handler is due when, because the counters moved or the loop must check for a stop."""
        for registration in self._present():
            registration.due = ALWAYS
        self.due = ALWAYS

    def _present(self) -> list[Registration]:
        return [registration for registration in self.registrations if registration.due != REMOVED]

    def __reduce__(self) -> tuple[Callable[..., "HandlerList"], tuple[Event, list[Registration]]]:
        return _handler_list_of, (self.event, self._present())


def _handler_list_of(event: Event, registrations: list[Registration]) -> HandlerList:
    handler_list = HandlerList(event)
    for registration in registrations:
        handler_list.add(registration)
    return handler_list
