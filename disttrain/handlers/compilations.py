"""Count the programs that the device's compiler makes during a run; a steady run compiles nothing new.

*Contract*: on a device that compiles whole steps (XLA) all compiled programs are counted. Those compiled after this
process's second step are also counted separately: a steady run has none. Programs of the validation are left out of the
second number, because they are compiled when the validation first runs. Operations that the compiler does not know run
on the CPU instead; the log names each of them once. On other devices this does nothing.
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
    """Counts compiled programs; attach it after everything else that computes at the end of a step."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._device_compiles = backend.programs() is not None
        self._num_steps = 0
        self._num_before_steady = 0
        self._num_in_validation = 0
        self._named_ops: set[str] = set()

    def attach(self, engine: Engine) -> None:
        if self._device_compiles:
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._count_step)

    def _count_step(self) -> None:
        self._num_steps += 1
        if self._num_steps <= STEADY_AFTER_STEPS:
            self._num_before_steady, self._num_in_validation = self._num_compiled(), 0
            self._name_fallback_ops()

    def _num_compiled(self) -> int:
        programs = self.backend.programs()
        return 0 if programs is None else programs.num_compiled

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave programs that are compiled in the body out of the number of a steady run."""
        before = self._num_compiled()
        try:
            yield
        finally:
            self._num_in_validation += self._num_compiled() - before

    def _name_fallback_ops(self) -> None:
        programs = self.backend.programs()
        for name in () if programs is None else programs.fallback_ops:
            if name not in self._named_ops:
                self._named_ops.add(name)
                reason = "a value was read from the device" if name == "aten::_local_scalar_dense" else "it is slow"
                logger.warning("%s is not compiled: the CPU runs it and the device waits (%s)", name, reason)

    def report(self) -> dict[str, Any]:
        """Return the entries for result.json; empty on a device that does not compile."""
        if not self._device_compiles:
            return {}
        self._name_fallback_ops()
        num_steady = self._num_compiled() - self._num_before_steady - self._num_in_validation
        return {
            "xla_compilations": self._num_compiled(),
            "xla_compilations_after_step_2": num_steady if self._num_steps > STEADY_AFTER_STEPS else 0,
            "xla_fallback_ops": sorted(self._named_ops),
        }
