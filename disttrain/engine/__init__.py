"""WHEN things happen: an engine calls a process function on batch after batch and fires events around it."""

from disttrain.engine.engine import Engine
from disttrain.engine.events import CallableEventWithFilter, EventEnum, Events, EventsList, RemovableEventHandle
from disttrain.engine.state import State

__all__ = [
    "CallableEventWithFilter",
    "Engine",
    "EventEnum",
    "Events",
    "EventsList",
    "RemovableEventHandle",
    "State",
]
