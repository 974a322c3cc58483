"""What the device's compiler did during a run: nothing once it is steady, if all goes well.

*Contract*: on a device that compiles whole steps (XLA) the programs compiled are counted, and those compiled after this
process's second step apart: a steady run has none. Programs of the validation do not count there, for they are
compiled when it first runs. Operations that the compiler does not know, which the CPU runs in its stead, are named
once each in the log. Elsewhere this does nothing.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from disttrain.backend import Backend
from disttrain.engine import Engine, Events

logger = logging.getLogger(__name__)

STEADY_AFTER_STEPS = 2


class Compilations:
    """Attached after everything else that acts at a step's end."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._counts = backend.programs() is not None
        self._num_steps = 0
        self._num_before = 0
        self._num_apart = 0
        self._named: set[str] = set()

    def attach(self, engine: Engine) -> None:
        if self._counts:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._note)

    def _note(self) -> None:
        self._num_steps += 1
        if self._num_steps <= STEADY_AFTER_STEPS:
            self._num_before, self._num_apart = self._num_compiled(), 0
            self._name_fallback_ops()

    def _num_compiled(self) -> int:
        programs = self.backend.programs()
        return 0 if programs is None else programs.num_compiled

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Do not count what is compiled in the body."""
        before = self._num_compiled()
        try:
            yield
        finally:
            self._num_apart += self._num_compiled() - before

    def _name_fallback_ops(self) -> None:
        programs = self.backend.programs()
        for name in () if programs is None else programs.fallback_ops:
            if name not in self._named:
                self._named.add(name)
                what = "a value was read from the device" if name == "aten::_local_scalar_dense" else "it is slow"
                logger.warning("%s is not compiled: the CPU runs it and the device waits (%s)", name, what)

    def report(self) -> dict[str, Any]:
        """Return what result.json holds of it; nothing where nothing is compiled."""
        if not self._counts:
            return {}
        self._name_fallback_ops()
        steady = self._num_compiled() - self._num_before - self._num_apart
        return {
            "xla_compilations": self._num_compiled(),
            "xla_compilations_after_step_2": steady if self._num_steps > STEADY_AFTER_STEPS else 0,
            "xla_fallback_ops": sorted(self._named),
        }
