"""Who is called when: events registered, handlers added and removed, events fired.

*Contract*: handlers run in the order they were added. One added while its event fires runs in that same firing; one
removed before its turn does not.
*Cost*: at an iteration for which no handler of an event is due, the loop finds that out with one comparison.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from disttrain.engine.events import (
    NEVER,
    CallableEventWithFilter,
    Event,
    EventEnum,
    Events,
    EventsList,
    RemovableEventHandle,
)
from disttrain.engine.registration import GONE, Registration, Slot
from disttrain.engine.state import State

Handler = TypeVar("Handler", bound=Callable[..., Any])


class Emitter:
    """Holds handlers and fires events; `Engine` adds the loop."""

    def __init__(self) -> None:
        self.state = State()
        self.last_event_name: Event | None = None
        self._slots: dict[Event, Slot] = {}
        self._event_to_attr: dict[Event, str] = {}
        self._stop_asked = False
        self.register_events(*Events)

    def register_events(self, *event_names: str | EventEnum, event_to_attr: dict[Any, str] | None = None) -> None:
        """Allow further events to be fired and handled.

        `event_to_attr` names the attribute of the state that an event's filters compare with; it starts at 0.
        """
        if event_to_attr is not None and not isinstance(event_to_attr, dict):
            raise ValueError(f"event_to_attr must be a dict of event to attribute name, got {event_to_attr!r}")
        for event in event_names:
            if not isinstance(event, str | EventEnum):
                raise TypeError(f"an event to register must be a str or an EventEnum, got {event!r}")
        for event in event_names:
            self._slots.setdefault(event, Slot(event))
            if event_to_attr and event in event_to_attr:
                self._event_to_attr[event] = event_to_attr[event]
        self._map_attributes()

    def _map_attributes(self) -> None:
        """Tell the state, which a program may have replaced, of the attributes that events are mapped to."""
        self.state.event_to_attr.update(self._event_to_attr)
        for name in self.state.event_to_attr.values():
            if not hasattr(self.state, name):
                setattr(self.state, name, 0)

    def has_registered_events(self, event: Event) -> bool:
        """Return whether handlers can be added to the event."""
        return isinstance(event, str | CallableEventWithFilter) and event in self._slots

    def add_event_handler(
        self, event_name: Event | EventsList, handler: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> RemovableEventHandle:
        """Call `handler` when the event fires: `handler(engine, *args, **kwargs)`, without engine if it takes none.

        EXCEPTION_RAISED passes the exception after the engine, TERMINATE_SINGLE_EPOCH `iter_counter` by keyword. A
        handler that cannot be called so is refused here. Several events are joined by `|`.
        """
        events = event_name if isinstance(event_name, EventsList) else [event_name]
        slots = [self._slot(event) for event in events]
        added = [
            Registration(slot.event, handler, getattr(event, "filter", None), args, kwargs, self)
            for slot, event in zip(slots, events, strict=True)
        ]
        for slot, registration in zip(slots, added, strict=True):
            slot.add(registration)
        return RemovableEventHandle(event_name, added, self)

    def on(self, event_name: Event | EventsList, *args: Any, **kwargs: Any) -> Callable[[Handler], Handler]:
        """Decorate a function to add it as a handler; see `add_event_handler`."""

        def add(handler: Handler) -> Handler:
            self.add_event_handler(event_name, handler, *args, **kwargs)
            return handler

        return add

    def has_event_handler(self, handler: Callable[..., Any], event_name: Event | EventsList | None = None) -> bool:
        """Return whether `handler` is on the event; on any event, without one."""
        if isinstance(event_name, EventsList):
            return any(self.has_event_handler(handler, event) for event in event_name)
        if event_name is None:
            return any(self.has_event_handler(handler, event) for event in self._slots)
        return self.has_registered_events(event_name) and any(
            registration.function == handler and registration.due != GONE
            for registration in self._slots[event_name].handlers
        )

    def remove_event_handler(self, handler: Callable[..., Any], event_name: Event) -> None:
        """Take every copy of `handler` off the event; ValueError if there is none."""
        slot = self._slot(event_name)
        if not slot.remove(handler):
            raise ValueError(f"expected a handler of {slot.event} to remove, got {handler!r}, which is not one")

    def fire_event(self, event_name: Event) -> None:
        """Call the handlers of the event whose filters pass now."""
        self._emit(self._slot(event_name).event)

    def _slot(self, event: Event) -> Slot:
        if not self.has_registered_events(event):
            raise ValueError(
                f"expected a registered event, got {event!r}; registered are "
                f"{', '.join(str(known) for known in self._slots)}; add others with register_events"
            )
        return self._slots[event]

    def _emit(self, event: Event, *args: Any, **kwargs: Any) -> bool:
        """Fire the event at whatever iteration; return as `_fire`."""
        self.last_event_name = event
        return self._fire(self._slots[event], NEVER, args, kwargs)

    def _fire(
        self, slot: Slot, position: int, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = MappingProxyType({})
    ) -> bool:
        """Call the handlers that are due at `position` and whose filters pass; return whether a stop is asked for."""
        due = NEVER
        slot.firing += 1
        try:
            for registration in slot.handlers:
                if registration.due <= position and (
                    registration.filter is None or self._passes(slot, registration, position)
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
            slot.firing -= 1
            if slot.stale and not slot.firing:
                slot.sweep()
        if self._stop_asked:
            return True  # and `due` stays as `wake` has left it
        slot.due = due
        return False

    def _passes(self, slot: Slot, registration: Registration, position: int) -> bool:
        """Ask the filter, and note the next iteration at which it is worth asking.

        A firing by hand notes nothing: the loop may yet come to fire the event at this very iteration.
        """
        value = self.state.iteration if slot.by_iteration else self.state.get_event_attrib_value(slot.event)
        if slot.by_iteration and registration.following is not None and position != NEVER:
            registration.due = registration.following(value)
        return registration.filter is None or registration.filter(self, value)
