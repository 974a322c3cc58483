"""A handler on an event: how it is called and when it is next due.

*Contract*: nothing here refers to the engine, so that an engine is freed by reference counting alone.
*Cost*: each handler knows the next iteration at which its filter passes (`due`), and each event the smallest of these.
"""

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from disttrain.engine.events import NEVER, Event, EventFilter, Events, NumericFilter
from disttrain.engine.signatures import takes_engine

ALWAYS = -1
"""Due before any iteration: look at each firing."""
GONE = NEVER + 1
"""Due after everything, an event fired by hand included: the handler is removed."""

_ADDED_ARGUMENTS: dict[Event, tuple[tuple[str, ...], tuple[str, ...]]] = {
    Events.EXCEPTION_RAISED: (("exception",), ()),
    Events.TERMINATE_SINGLE_EPOCH: ((), ("iter_counter",)),
}
"""What an event passes to its handlers: positional after the engine, and by keyword."""


class OwnMethod:
    """A handler that is a method of the engine it is on, held without keeping the engine alive."""

    __slots__ = ("engine", "function")

    def __init__(self, method: MethodType) -> None:
        self.engine = weakref.ref(method.__self__)
        self.function = method.__func__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.engine(), *args, **kwargs)

    def __eq__(self, other: object) -> bool:
        mine = MethodType(self.function, self.engine())
        return mine == (MethodType(other.function, other.engine()) if isinstance(other, OwnMethod) else other)

    def __hash__(self) -> int:
        return hash(self.function)

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnMethod, (MethodType(self.function, self.engine()),)


class Registration:
    """A handler on one event: how it is called, and the next iteration at which its filter can pass."""

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


class Slot:
    """A registered event with its handlers.

    `due`: no handler has to be called at an iteration below it. `by_iteration`: the event is the loop's own and its
    filters go by `state.iteration`, which rises from one firing to the next, so that `due` can be known ahead.
    """

    __slots__ = ("by_iteration", "due", "event", "firing", "handlers", "stale")

    def __init__(self, event: Event) -> None:
        self.event = event
        self.handlers: list[Registration] = []
        self.by_iteration = False
        self.firing = 0
        self.stale = False
        self.due = NEVER

    def add(self, registration: Registration) -> None:
        """Append a handler; a firing under way comes to it."""
        self.handlers.append(registration)
        self.due = ALWAYS

    def remove(self, handler: Callable[..., Any]) -> bool:
        """Take every copy of `handler` off; return whether there was one."""
        found = [kept for kept in self.handlers if kept.due != GONE and kept.function == handler]
        for registration in found:
            registration.due = GONE
        self.stale = self.stale or bool(found)
        if not self.firing:
            self.sweep()
        return bool(found)

    def sweep(self) -> None:
        """Drop the removed; not while the list is being walked, or a handler would be passed over."""
        self.handlers = [kept for kept in self.handlers if kept.due != GONE]
        self.stale = False
        self.due = ALWAYS  # not NEVER, whoever is left: somebody may have woken the event

    def wake(self) -> None:
        """Forget what is due when: the counters moved, or somebody has to look."""
        for registration in self.handlers:
            if registration.due != GONE:
                registration.due = ALWAYS
        self.due = ALWAYS

    def __reduce__(self) -> tuple[Callable[..., "Slot"], tuple[Event, list[Registration]]]:
        return _slot_with, (self.event, [kept for kept in self.handlers if kept.due != GONE])


def _slot_with(event: Event, handlers: list[Registration]) -> Slot:
    slot = Slot(event)
    for registration in handlers:
        slot.add(registration)
    return slot
