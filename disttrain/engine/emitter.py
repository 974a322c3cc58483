"""The events of an engine and their handlers: register events, add and remove handlers, fire events.

*Contract*: handlers run in the order in which they were added. A handler that is added while its event fires runs in
that same firing. A handler that is removed before its turn does not run.
*Cost*: one comparison at an iteration at which no handler of the event is due.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar

from disttrain.engine.events import NEVER, CallableEventWithFilter, Event, EventEnum, Events, EventsList
from disttrain.engine.registration import REMOVED, HandlerList, Registration
from disttrain.engine.state import State

Handler = TypeVar("Handler", bound=Callable[..., Any])


class RemovableEventHandle:
    """Removes a handler from its events, by `remove()` or at the end of a `with` block.

    It keeps neither the engine nor the handler alive. Like `Engine.remove_event_handler`, it removes every copy of the
    handler on these events.
    """

    def __init__(self, event_name: Event | EventsList, added: Sequence[Registration], engine: "Emitter") -> None:
        self.event_name = event_name
        self.engine = weakref.ref(engine)
        self._added = [weakref.ref(registration) for registration in added]

    def handler(self) -> Callable[..., Any] | None:
        """Return the handler, or None if it is on none of the events any more."""
        return next((registration.function for ref in self._added if (registration := ref()) is not None), None)

    def remove(self) -> None:
        """Remove the handler. A second call does nothing, nor does a call after the engine was freed."""
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


class Emitter:
    """Holds the events with their handlers, and fires events."""

    def __init__(self) -> None:
        self.state = State()
        self.last_event_name: Event | None = None
        self._handler_lists: dict[Event, HandlerList] = {}
        self._event_to_attr: dict[Event, str] = {}
        self._stop_requested = False
        self.register_events(*Events)

    def register_events(self, *event_names: str | EventEnum, event_to_attr: dict[Any, str] | None = None) -> None:
        """Register further events, which can then be fired and handled.

        `event_to_attr` gives an event the name of the state's attribute that its filters compare with. A new
        attribute starts at 0.
        """
        if event_to_attr is not None and not isinstance(event_to_attr, dict):
            raise ValueError(f"event_to_attr must be a dict of event to attribute name, got {event_to_attr!r}")
        for event in event_names:
            if not isinstance(event, str | EventEnum):
                raise TypeError(f"an event to register must be a str or an EventEnum, got {event!r}")
        for event in event_names:
            self._handler_lists.setdefault(event, HandlerList(event))
            if event_to_attr and event in event_to_attr:
                self._event_to_attr[event] = event_to_attr[event]
        self._map_attributes()

    def _map_attributes(self) -> None:
        """Write the events' attributes into the state, which a program may have replaced; new ones start at 0."""
        self.state.event_to_attr.update(self._event_to_attr)
        for name in self.state.event_to_attr.values():
            if not hasattr(self.state, name):
                setattr(self.state, name, 0)

    def has_registered_events(self, event: Event) -> bool:
        """Return whether handlers can be added to the event."""
        return isinstance(event, str | CallableEventWithFilter) and event in self._handler_lists

    def add_event_handler(
        self, event_name: Event | EventsList, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RemovableEventHandle:
        """Call `handler` when the event fires: `handler(engine, *args, **kwargs)`, without engine if it takes none.

        EXCEPTION_RAISED passes the exception after the engine. TERMINATE_SINGLE_EPOCH passes `iter_counter` by
        keyword. A handler that cannot be called so is a ValueError here. `|` joins several events.
        """
        events = event_name if isinstance(event_name, EventsList) else [event_name]
        handler_lists = [self._handler_list(event) for event in events]
        added = [
            Registration(handler_list.event, handler, getattr(event, "filter", None), args, kwargs, self)
            for handler_list, event in zip(handler_lists, events, strict=True)
        ]
        for handler_list, registration in zip(handler_lists, added, strict=True):
            handler_list.add(registration)
        return RemovableEventHandle(event_name, added, self)

    def on(self, event_name: Event | EventsList, *args: Any, **kwargs: Any) -> Callable[[Handler], Handler]:
        """Return a decorator that adds a function as a handler; see `add_event_handler`."""

        def add(handler: Handler) -> Handler:
            self.add_event_handler(event_name, handler, *args, **kwargs)
            return handler

        return add

    def has_event_handler(self, handler: Callable[..., Any], event_name: Event | EventsList | None = None) -> bool:
        """Return whether `handler` is on the event, or on any event if none is given."""
        if isinstance(event_name, EventsList):
            return any(self.has_event_handler(handler, event) for event in event_name)
        if event_name is None:
            return any(self.has_event_handler(handler, event) for event in self._handler_lists)
        return self.has_registered_events(event_name) and any(
            registration.function == handler and registration.due != REMOVED
            for registration in self._handler_lists[event_name].registrations
        )

    def registrations(self) -> list[Registration]:
        """Return the handlers with their arguments: event by event, in the order in which they run."""
        lists = self._handler_lists.values()
        return [each for handler_list in lists for each in handler_list.registrations if each.due != REMOVED]

    def remove_event_handler(self, handler: Callable[..., Any], event_name: Event) -> None:
        """Remove every copy of `handler` from the event; ValueError if there is none."""
        handler_list = self._handler_list(event_name)
        if not handler_list.remove(handler):
            raise ValueError(f"expected a handler of {handler_list.event} to remove, got {handler!r}, which is not one")

    def fire_event(self, event_name: Event) -> None:
        """Call the handlers of the event whose filters pass now."""
        self._emit(self._handler_list(event_name).event)

    def _handler_list(self, event: Event) -> HandlerList:
        if not self.has_registered_events(event):
            raise ValueError(
                f"expected a registered event, got {event!r}; registered are "
                f"{', '.join(str(known) for known in self._handler_lists)}; add others with register_events"
            )
        return self._handler_lists[event]

    def _emit(self, event: Event, *args: Any, **kwargs: Any) -> bool:
        """Fire the event at any iteration; return whether a stop is requested."""
        self.last_event_name = event
        return self._fire(self._handler_lists[event], NEVER, args, kwargs)

    def _fire(
        self,
        handler_list: HandlerList,
        position: int,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> bool:
        """Call the handlers that are due at `position` and whose filters pass; return whether a stop is requested."""
        due = NEVER
        handler_list.firing += 1
        try:
            for registration in handler_list.registrations:
                if registration.due <= position and (
                    registration.filter is None or self._passes(handler_list, registration, position)
                ):
                    if registration.bare:
                        registration.function(self)
                    elif registration.takes_engine:
                        registration.function(self, *args, *registration.args, **registration.kwargs, **kwargs)
                    else:
                        registration.function(*args, *registration.args, **registration.kwargs, **kwargs)
                if registration.due < due:
                    due = registration.due
        finally:
            handler_list.firing -= 1
            if handler_list.stale and not handler_list.firing:
                handler_list.sweep()
        if self._stop_requested:
            return True  # and leave the list's `due` as `wake` has set it
        handler_list.due = due
        return False

    def _passes(self, handler_list: HandlerList, registration: Registration, position: int) -> bool:
        """Call the filter, and write down the next iteration at which it can pass.

        A firing by hand writes down nothing, since the loop may still fire the event at this same iteration.
        """
        by_iteration = handler_list.by_iteration
        value = self.state.iteration if by_iteration else self.state.get_event_attrib_value(handler_list.event)
        if by_iteration and registration.following is not None and position != NEVER:
            registration.due = registration.following(value)
        return registration.filter is None or registration.filter(self, value)
