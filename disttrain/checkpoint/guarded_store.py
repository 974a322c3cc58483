"""A store that is changed only while a guard allows it: a run's store, while the run directory is the run's own.

*Contract*: `guard()` raises whatever forbids a change. It is called before an upload begins, again right before the
commit, and before leftovers are removed; its error then is the caller's. An old checkpoint that the guard protects
stays, with a line in the log. Reading is not guarded. A part that cannot be written raises the guard's error if it has
one, for that is the cause.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor

from disttrain.checkpoint.manifest import FileRecord, Manifest
from disttrain.checkpoint.store import CheckpointStore
from disttrain.errors import CheckpointError, DisttrainError

logger = logging.getLogger(__name__)

Guard = Callable[[], None]


def guarded(store: CheckpointStore, guard: Guard) -> CheckpointStore:
    """Return `store` with a guard before each change."""
    return cast(CheckpointStore, _GuardedStore(store, guard))


class _GuardedStore:
    """Delegates everything to a store; what is defined here asks the guard."""

    def __init__(self, store: CheckpointStore, guard: Guard) -> None:
        self._store = store
        self._guard = guard

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def __str__(self) -> str:
        return str(self._store)

    def begin(self, step: int) -> str:
        self._guard()
        return self._store.begin(step)

    def write_part(self, upload: str, file: str, tensors: Mapping[str, Tensor]) -> FileRecord:
        try:
            return self._store.write_part(upload, file, tensors)
        except CheckpointError:
            self._guard()
            raise

    def commit(self, upload: str, manifest: Manifest) -> str:
        self._guard()
        return self._store.commit(upload, manifest)

    def clean(self) -> None:
        self._guard()
        self._store.clean()

    def discard(self, name: str) -> None:
        try:
            self._guard()
        except DisttrainError as error:
            logger.warning("%s stays: %s", self._store.path(name), error)
            return
        self._store.discard(name)
