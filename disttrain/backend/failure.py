"""The first failure of a run, posted where every rank hears of it, wherever it is blocked.

*Contract*: the first failure posted wins and is never replaced. `first` looks into the store, where that still answers;
what was brought here before is known also after the store's host has gone.

*How*: rank r's listener, one sleeping thread with a connection of its own, waits for the key `bell/r` in the
rendezvous store. Who fails posts the failure by compare-and-set and rings every bell. A listener that is rung
keeps the message, acknowledges it and calls `on_failure`, which breaks this rank's connections: a collective
that its main thread is blocked in then raises at once. The poster waits for the acknowledgements, so that
neither the store (rank 0's) nor the launcher's clean-up takes the message away before it is read; but not for long
once no more of them come, for a rank that was killed or whose host is lost sends none.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from disttrain.backend.calls import describe_error
from disttrain.backend.stores import Store
from disttrain.errors import RemoteError

logger = logging.getLogger(__name__)

FIRST = "failure/first"
ACKS = "failure/acks"
LINGER_S = 5.0
QUIET_S = 1.5
"""Without a further acknowledgement for so long no more are waited for."""
POLL_S = 0.02
_CLOSING = "closing"


class Board:
    """The board of one process alone: it remembers the first failure."""

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._failure: RemoteError | None = None
        self._heard = threading.Event()
        self._hurried = threading.Event()

    def publish(self, error: BaseException) -> None:
        """Post `error`, unless another failure was first. Never raises."""
        self.post(_to_post(self._rank, error))

    def post(self, posted: str) -> None:
        """Let whoever shares this board hear of a failure."""
        self.hear(posted)

    def first(self, wait_s: float) -> RemoteError | None:
        """Return the first failure that was posted, waiting for it up to `wait_s`."""
        end = time.monotonic() + wait_s
        while not self._hurried.is_set() and not self._heard.wait(min(POLL_S, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                break
        return self.known()

    def known(self) -> RemoteError | None:
        """Return the first failure if it has been brought here; asks nobody, so it may be called in every step."""
        failure = self._failure
        return None if failure is None else RemoteError(failure.rank, failure.message)

    def hurry(self) -> None:
        """Wait for nobody any more. Called by any thread."""
        self._hurried.set()

    def close(self) -> None:
        """Stop listening. A failure that was heard is still known."""

    def hear(self, posted: str) -> None:
        """Keep the failure that was posted, if it is the first."""
        if self._failure is None:
            rank, message = json.loads(posted)
            self._failure = RemoteError(rank, message)
        self._heard.set()


class StoreBoard(Board):
    """The board of several ranks; `connect_store` opens a new connection to their common store."""

    def __init__(
        self, rank: int, world_size: int, connect_store: Callable[[], Store], on_failure: Callable[[], None]
    ) -> None:
        super().__init__(rank)
        self._others = [other for other in range(world_size) if other != rank]
        self._acks = 0
        self._once = threading.Lock()
        self._store = connect_store()
        self._on_failure = on_failure
        self._closed = False
        self._lingered = False
        self._listener = threading.Thread(
            target=self._listen, args=(connect_store(),), name="disttrain-failure-listener", daemon=True
        )
        self._listener.start()

    def publish(self, error: BaseException) -> None:
        if not self._closed:
            try:
                posted = self._store.compare_set(FIRST, "", _to_post(self._rank, error)).decode()
                for other in self._others:
                    self._store.set(f"failure/bell/{other}", posted)
                self.hear(posted)
            except RuntimeError as gone:
                logger.warning("the other ranks could not be told that this one failed: %s", gone)
        super().publish(error)
        self._on_failure()
        self._linger()

    def first(self, wait_s: float) -> RemoteError | None:
        try:
            if self._failure is None and not self._closed and self._store.check([FIRST]):
                self.hear(self._store.get(FIRST).decode())
        except RuntimeError as gone:
            logger.debug("the store has gone, and what was posted there with it: %s", gone)
        return super().first(wait_s)

    def close(self) -> None:
        """Stop listening, once the others have heard of a failure that this rank knows of."""
        if self._closed:
            return
        if self._failure is not None:
            self._linger()
        self._closed = True
        try:
            self._acknowledge(self._store)
            if self._listener.is_alive():
                self._store.set(f"failure/bell/{self._rank}", _CLOSING)
        except RuntimeError:
            logger.debug("the store has gone, and the listener with it")
        self._listener.join(LINGER_S)

    def _linger(self) -> None:
        """Wait, once, until every rank has heard that still can."""
        if self._lingered:
            return
        self._lingered = True
        began = last = time.monotonic()
        try:
            self._acknowledge(self._store)
            while self._acks <= len(self._others) and not self._hurried.wait(POLL_S):
                now, before = time.monotonic(), self._acks
                self._acks = self._store.add(ACKS, 0)
                last = now if self._acks > before else last
                if now - last > QUIET_S or now - began > LINGER_S:
                    break
        except RuntimeError as gone:
            logger.debug("the store has gone before every rank acknowledged the failure: %s", gone)

    def _acknowledge(self, store: Store) -> None:
        """Let those that linger know, once, that they need not do it for this rank; note how many have done so."""
        with self._once:
            if not self._acks:
                self._acks = store.add(ACKS, 1)

    def _listen(self, store: Store) -> None:
        bell = f"failure/bell/{self._rank}"
        try:
            _wait_for_days(store, bell)
            posted = store.get(bell).decode()
            if posted == _CLOSING:
                return
            self.hear(posted)
            self._acknowledge(store)
        except RuntimeError as gone:
            logger.debug("rank %s stops listening for failures, the store has gone: %s", self._rank, gone)
        if self._failure is not None:
            self._on_failure()


def _wait_for_days(store: Store, key: str) -> None:
    """Wait until `key` is set; RuntimeError when the store has gone. One wait may be at most 2**31 ms, 24 days."""
    while not store.check([key]):
        try:
            store.wait([key], timedelta(days=7))
        except RuntimeError as error:
            logger.debug("waiting for %s ended: %s", key, error)


def _to_post(rank: int, error: BaseException) -> str:
    """Return what is posted; a rank that only passes on another's failure posts that one."""
    if isinstance(error, RemoteError):
        return json.dumps([error.rank, error.message])
    return json.dumps([rank, describe_error(error)])
