"""The events of a run, and filters on them.

*Contract*: an event is equal to its name and hashed like it. Members of two enums are never equal, so two enums may
have events of the same name. A string means the event that was registered first under this name.
*Cost*: a filter made of numbers gives the next value that passes, so the engine need not check the values before it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from numbers import Integral
from typing import Any, SupportsIndex, overload

from disttrain.engine.signatures import check_takes_two

NEVER = 2**62
"""A value that no counter reaches."""

EventFilter = Callable[[Any, int], bool]
"""`event_filter(engine, event_value)` returns whether the handler is called."""


class Periodic:
    """Passes every `every`-th value of `after < value < before`, counted from `after` if there is one."""

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
        index = bisect_left(self._values, value)
        return index < len(self._values) and self._values[index] == value

    def following(self, value: int) -> int:
        """Return the smallest value above `value` that passes, or NEVER."""
        index = bisect_right(self._values, value)
        return self._values[index] if index < len(self._values) else NEVER


NumericFilter = Periodic | Listed
"""A filter made of numbers alone, which also gives the next value that passes."""


class CallableEventWithFilter:
    """An event with a filter, which decides at which firings a handler is called.

    `name` and `value` are those of the event. `filter` is None or a callable `(engine, event_value) -> bool`.
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
        """Return this event with a filter; the event itself does not change.

        Give exactly one of: `event_filter`; `once`; any of `every`, `before` and `after` together.
        """
        periodic = not (every is None and before is None and after is None)
        if (event_filter is not None) + (once is not None) + periodic != 1:
            raise ValueError(
                f"{self.name}(...) expects exactly one of: event_filter; once; any of every, before and after "
                f"together; got event_filter={event_filter!r}, every={every!r}, once={once!r}, before={before!r}, "
                f"after={after!r}"
            )
        new_filter: EventFilter | None
        if event_filter is not None:
            new_filter = _checked_filter(event_filter)
        elif once is not None:
            new_filter = Listed(_checked_once(once))
        else:
            new_filter = _periodic(every, before, after)
        filtered = CallableEventWithFilter(self.value, new_filter, self.name)
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
    """The base class of enums of events: `class MyEvents(EventEnum): LOSS_COMPUTED = "loss_computed"`."""

    def __init__(self, value: str) -> None:
        self._enum = type(self)
        self.filter = None

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


class Events(EventEnum):
    """The events that an `Engine` fires. `Engine.run` gives their order."""

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


class RunEvents(EventEnum):
    """The events that the trainer of a Config's run fires beside those of `Events`.

    EVALUATED: after each whole evaluation of the validation data, on every rank. `state.metrics` then holds its results
    under "valid/NAME", such as "valid/loss". Filters count the evaluations of the run: `EVALUATED(every=2)`.
    """

    EVALUATED = "evaluated"


class EventsList(Sequence[CallableEventWithFilter]):
    """Events joined by `|`. Each `|` returns a new list and changes neither side."""

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
"""An event, or the name of one."""


def _checked_filter(event_filter: EventFilter) -> EventFilter:
    if not callable(event_filter):
        raise TypeError(f"event_filter must be a callable (engine, event_value) -> bool, got {event_filter!r}")
    check_takes_two(event_filter, "event_filter", "the engine and the event's value")
    return event_filter


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _checked_once(once: int | Sequence[int]) -> list[int]:
    values = list(once) if isinstance(once, Sequence) else [once]
    if not values or not all(_is_integer(value) and value > 0 for value in values):
        raise ValueError(f"once must be a positive integer or a non-empty sequence of them, got {once!r}")
    return [int(value) for value in values]


def _periodic(every: int | None, before: int | None, after: int | None) -> Periodic | None:
    if every is not None and not (_is_integer(every) and every > 0):
        raise ValueError(f"every must be a positive integer, got {every!r}")
    for name, bound in (("before", before), ("after", after)):
        if bound is not None and not (_is_integer(bound) and bound >= 0):
            raise ValueError(f"{name} must be an integer of at least 0, got {bound!r}")
    if every == 1 and before is None and after is None:
        return None
    bounds = (None if bound is None else int(bound) for bound in (before, after))
    return Periodic(1 if every is None else int(every), *bounds)
