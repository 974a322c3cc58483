"""When things happen: the events of a run, filters on them, and handles to take a handler off again.

*Contract*: an event is equal to, and hashed as, its name. Members of two enums are never equal, so two enums may
each have an event of the same name; a string stands for the event that was registered first under it.
*Cost*: a filter made of numbers can tell the next value that passes, so that the engine need not ask at each.
"""

import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from numbers import Integral
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, overload

from disttrain.engine.signatures import check_takes_two

if TYPE_CHECKING:
    from disttrain.engine.emitter import Emitter
    from disttrain.engine.registration import Registration

NEVER = 2**62
"""A value that no counter reaches."""

EventFilter = Callable[[Any, int], bool]
"""`event_filter(engine, event_value)`: whether the handlers are called."""


class Periodic:
    """Passes `after < value < before`, and of those one in `every`, counted from `after` if there is one."""

    def __init__(self, every: int, before: int | None, after: int | None) -> None:
        self._every = every
        self._phase = 0 if after is None else after + 1
        self._first = -NEVER if after is None else after + 1
        self._before = NEVER if before is None else before

    def __call__(self, engine: Any, value: int) -> bool:
        return self._first <= value < self._before and (value - self._phase) % self._every == 0

    def following(self, value: int) -> int:
        """Return the smallest value above `value` that passes, or NEVER."""
        start = max(value + 1, self._first)
        due = start + (self._phase - start) % self._every
        return due if due < self._before else NEVER


class Listed:
    """Passes the values given to `once`."""

    def __init__(self, values: Iterable[int]) -> None:
        self._values = sorted(set(values))

    def __call__(self, engine: Any, value: int) -> bool:
        place = bisect_left(self._values, value)
        return place < len(self._values) and self._values[place] == value

    def following(self, value: int) -> int:
        """Return the smallest value above `value` that passes, or NEVER."""
        place = bisect_right(self._values, value)
        return self._values[place] if place < len(self._values) else NEVER


NumericFilter = Periodic | Listed
"""A filter on numbers alone: besides passing a value or not, it knows which value is the next to pass."""


class CallableEventWithFilter:
    """An event, and the filter that says at which of its firings a handler is called.

    `name` and `value` are those of the event; `filter` is None or a callable `(engine, event_value) -> bool`.
    """

    def __init__(self, value: str, event_filter: EventFilter | None = None, name: str | None = None) -> None:
        self._value_ = value
        self._name_ = value if name is None else name
        self._enum: type[EventEnum] | None = None
        self.filter = event_filter

    @property
    def name(self) -> str:
        return self._name_

    @property
    def value(self) -> str:
        return self._value_

    def __call__(
        self,
        event_filter: EventFilter | None = None,
        every: int | None = None,
        once: int | Sequence[int] | None = None,
        before: int | None = None,
        after: int | None = None,
    ) -> "CallableEventWithFilter":
        """Return this event with a filter; the event itself is left as it is.

        Exactly one of: `event_filter`; `once`; any of `every`, `before` and `after` together.
        """
        periodic = not (every is None and before is None and after is None)
        if (event_filter is not None) + (once is not None) + periodic != 1:
            raise ValueError(
                f"{self.name}(...) expects exactly one of: event_filter; once; any of every, before and after "
                f"together; got event_filter={event_filter!r}, every={every!r}, once={once!r}, before={before!r}, "
                f"after={after!r}"
            )
        chosen: EventFilter | None
        if event_filter is not None:
            chosen = _checked_filter(event_filter)
        elif once is not None:
            chosen = Listed(_checked_once(once))
        else:
            chosen = _periodic(every, before, after)
        filtered = CallableEventWithFilter(self.value, chosen, self.name)
        filtered._enum = self._enum
        return filtered

    def __or__(self, other: "CallableEventWithFilter") -> "EventsList":
        return EventsList([self]) | other

    def __eq__(self, other: object) -> bool:
        if isinstance(other, CallableEventWithFilter):
            enums = {self._enum, other._enum} - {None}
            return self.name == other.name and len(enums) < 2
        if isinstance(other, str):
            return self.name == other
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self._name_)

    def __repr__(self) -> str:
        return f"<event={self.name}, filter={self.filter}>"


class EventEnum(CallableEventWithFilter, Enum):
    """Base of enums of events: `class MyEvents(EventEnum): LOSS_COMPUTED = "loss_computed"`."""

    def __init__(self, value: str) -> None:
        self._enum = type(self)
        self.filter = None

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


class Events(EventEnum):
    """What an `Engine` fires; the order is in `Engine.run`."""

    EPOCH_STARTED = "epoch_started"
    EPOCH_COMPLETED = "epoch_completed"
    STARTED = "started"
    COMPLETED = "completed"
    ITERATION_STARTED = "iteration_started"
    ITERATION_COMPLETED = "iteration_completed"
    EXCEPTION_RAISED = "exception_raised"
    GET_BATCH_STARTED = "get_batch_started"
    GET_BATCH_COMPLETED = "get_batch_completed"
    DATALOADER_STOP_ITERATION = "dataloader_stop_iteration"
    TERMINATE = "terminate"
    TERMINATE_SINGLE_EPOCH = "terminate_single_epoch"
    INTERRUPT = "interrupt"


class EventsList(Sequence[CallableEventWithFilter]):
    """Events joined by `|`; each `|` gives a new list and leaves both sides as they were."""

    def __init__(self, events: Iterable[CallableEventWithFilter] = ()) -> None:
        self._events = tuple(events)

    def __or__(self, other: CallableEventWithFilter) -> "EventsList":
        if not isinstance(other, CallableEventWithFilter):
            raise TypeError(f"expected an event after |, got {other!r} of type {type(other).__name__}")
        return EventsList([*self._events, other])

    def __len__(self) -> int:
        return len(self._events)

    @overload
    def __getitem__(self, index: SupportsIndex) -> CallableEventWithFilter: ...
    @overload
    def __getitem__(self, index: slice) -> "EventsList": ...
    def __getitem__(self, index: SupportsIndex | slice) -> "CallableEventWithFilter | EventsList":
        return EventsList(self._events[index]) if isinstance(index, slice) else self._events[index]

    def __iter__(self) -> Iterator[CallableEventWithFilter]:
        return iter(self._events)

    def __repr__(self) -> str:
        return f"EventsList({list(self._events)!r})"


Event = str | CallableEventWithFilter
"""What names one event."""


class RemovableEventHandle:
    """Takes a handler off its events again: by `remove()`, or on leaving a `with` block.

    It keeps neither the engine nor the handler alive. As with `Engine.remove_event_handler`, every copy of the handler
    on these events goes.
    """

    def __init__(self, event_name: "Event | EventsList", added: "Sequence[Registration]", engine: "Emitter") -> None:
        self.event_name = event_name
        self.engine = weakref.ref(engine)
        self._added = [weakref.ref(registration) for registration in added]

    def handler(self) -> Callable[..., Any] | None:
        """Return the handler while it is on one of the events, else None."""
        return next((registration.function for ref in self._added if (registration := ref()) is not None), None)

    def remove(self) -> None:
        """Take the handler off; does nothing the second time, or when the engine is gone."""
        engine, handler = self.engine(), self.handler()
        if engine is None or handler is None:
            return
        for event in self.event_name if isinstance(self.event_name, EventsList) else [self.event_name]:
            if engine.has_event_handler(handler, event):
                engine.remove_event_handler(handler, event)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _checked_filter(event_filter: EventFilter) -> EventFilter:
    if not callable(event_filter):
        raise TypeError(f"event_filter must be a callable (engine, event_value) -> bool, got {event_filter!r}")
    check_takes_two(event_filter, "event_filter", "the engine and the event's value")
    return event_filter


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _checked_once(once: int | Sequence[int]) -> list[int]:
    values = list(once) if isinstance(once, Sequence) else [once]
    if not values or not all(_whole(value) and value > 0 for value in values):
        raise ValueError(f"once must be a positive integer or a non-empty sequence of them, got {once!r}")
    return [int(value) for value in values]


def _periodic(every: int | None, before: int | None, after: int | None) -> Periodic | None:
    if every is not None and not (_whole(every) and every > 0):
        raise ValueError(f"every must be a positive integer, got {every!r}")
    for name, bound in (("before", before), ("after", after)):
        if bound is not None and not (_whole(bound) and bound >= 0):
            raise ValueError(f"{name} must be an integer of at least 0, got {bound!r}")
    if every == 1 and before is None and after is None:
        return None
    bounds = (None if bound is None else int(bound) for bound in (before, after))
    return Periodic(1 if every is None else int(every), *bounds)
