"""The state of a run: counters, limits, the batch, the output, and any attributes that a program adds."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from disttrain.engine.events import Event, Events

_COUNTED_BY: Mapping[Event, str] = {
    Events.GET_BATCH_STARTED: "iteration",
    Events.GET_BATCH_COMPLETED: "iteration",
    Events.ITERATION_STARTED: "iteration",
    Events.ITERATION_COMPLETED: "iteration",
    Events.EPOCH_STARTED: "epoch",
    Events.EPOCH_COMPLETED: "epoch",
    Events.STARTED: "epoch",
    Events.COMPLETED: "epoch",
}


class State:
    """The attributes that the engine, the handlers and the process function share; a program may add others.

    `event_to_attr` maps an event to the name of the attribute that its filters compare with. Each state has its own
    map. `times` holds the seconds of the last epoch under "EPOCH_COMPLETED" and of the run under "COMPLETED"; the
    events themselves find them too.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.iteration: int = 0
        self.epoch: int = 0
        self.epoch_length: int | None = None
        self.max_epochs: int | None = None
        self.max_iters: int | None = None
        self.output: Any = None
        self.batch: Any = None
        self.dataloader: Iterable[Any] | None = None
        self.seed: int | None = None
        self.metrics: dict[str, Any] = {}
        self.times: dict[Event, float | None] = {"EPOCH_COMPLETED": None, "COMPLETED": None}
        self.event_to_attr: dict[Event, str] = dict(_COUNTED_BY)
        for name, value in kwargs.items():
            setattr(self, name, value)

    def get_event_attrib_value(self, event_name: Event) -> int:
        """Return the value that filters on the event compare with; RuntimeError if the event has none."""
        attribute = self.event_to_attr.get(event_name)
        if attribute is None:
            raise RuntimeError(
                f"expected an event with an attribute of the state to filter by, got {event_name!r}; "
                f"give it one with register_events(..., event_to_attr={{event: attribute}})"
            )
        value: int = getattr(self, attribute)
        return value

    if TYPE_CHECKING:
        # Programs add attributes of their own, so a type checker must accept any name. These two are for the checker
        # alone: at run time they would slow down every access of the loop.
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __repr__(self) -> str:
        lines = ["State:"]
        for name, value in vars(self).items():
            shown = value if isinstance(value, str | int | float | bool | None) else type(value)
            lines.append(f"\t{name}: {shown}")
        return "\n".join(lines) + "\n"
