"""Boards: they carry the first failure of a run to every rank, whatever the rank is blocked in.

*Contract*: the first failure that is posted wins and is never replaced. `first` reads the store while the store
answers. A failure that this rank has received stays known after the host of the store has ended.

*How*: each rank has a listener, one sleeping thread with a connection of its own. Rank r's listener waits for its bell,
the key `failure/bell/r` of the store. A rank that fails posts the failure by compare-and-set and writes it to every
bell. A listener whose bell is set keeps the failure, acknowledges it and calls `on_failure`, which breaks this rank's
connections: a collective in which the main thread is blocked then raises at once. The rank that failed waits for the
acknowledgements, because the message is lost when the store (rank 0's) or the launcher's clean-up ends the processes.
It stops waiting soon after the last acknowledgement: a rank that was killed, or whose host is lost, sends none.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from disttrain.backend.headers import describe_error
from disttrain.backend.stores import Store
from disttrain.errors import RemoteError

logger = logging.getLogger(__name__)

FIRST = "failure/first"
_ACKS = "failure/acks"
_LINGER_S = 5.0
"""How long a rank that failed waits for acknowledgements."""
_QUIET_S = 1.5
"""How long it waits for the next acknowledgement."""
_POLL_S = 0.02
_CLOSING = "closing"


class Board:
    """The board of one process alone: it keeps the first failure."""

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._failure: RemoteError | None = None
        self._received = threading.Event()
        self._hurried = threading.Event()

    def publish(self, error: BaseException) -> None:
        """Post `error`, unless another failure was first. Never raises."""
        self.post(_encode_failure(self._rank, error))

    def post(self, failure: str) -> None:
        """Send an encoded failure to all ranks that share this board."""
        self.receive(failure)

    def first(self, wait_s: float) -> RemoteError | None:
        """Return the first failure that was posted, after a wait of at most `wait_s`."""
        deadline = time.monotonic() + wait_s
        while not self._hurried.is_set():
            rest_s = max(0.0, deadline - time.monotonic())
            if self._received.wait(min(_POLL_S, rest_s)) or time.monotonic() >= deadline:
                break
        return self.known()

    def known(self) -> RemoteError | None:
        """Return the failure that this rank has received, or None; reads no store, so every step may call it."""
        failure = self._failure
        return None if failure is None else RemoteError(failure.rank, failure.message)

    def hurry(self) -> None:
        """Stop every wait for other ranks. Any thread may call it."""
        self._hurried.set()

    def close(self) -> None:
        """Stop listening. A failure that was received stays known."""

    def receive(self, failure: str) -> None:
        """Keep an encoded failure, if it is the first."""
        if self._failure is None:
            rank, message = json.loads(failure)
            self._failure = RemoteError(rank, message)
        self._received.set()


class StoreBoard(Board):
    """The board of several ranks. `connect_store` opens a new connection to their common store."""

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
                first = self._store.compare_set(FIRST, "", _encode_failure(self._rank, error)).decode()
                for other in self._others:
                    self._store.set(f"failure/bell/{other}", first)
                self.receive(first)
            except RuntimeError as lost:
                logger.warning("this rank failed and could not report it to the other ranks: %s", lost)
        super().publish(error)
        self._on_failure()
        self._linger()

    def first(self, wait_s: float) -> RemoteError | None:
        try:
            if self._failure is None and not self._closed and self._store.check([FIRST]):
                self.receive(self._store.get(FIRST).decode())
        except RuntimeError as lost:
            logger.debug("the store has ended, with the failures that were posted in it: %s", lost)
        return super().first(wait_s)

    def close(self) -> None:
        """Stop listening, after the other ranks have received a failure that this rank knows."""
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
            logger.debug("the store has ended, and the listener with it")
        self._listener.join(_LINGER_S)

    def _linger(self) -> None:
        """Wait, once, for the acknowledgements of all ranks that are still alive."""
        if self._lingered:
            return
        self._lingered = True
        began = last_ack = time.monotonic()
        try:
            self._acknowledge(self._store)
            while self._acks <= len(self._others) and not self._hurried.wait(_POLL_S):
                now, before = time.monotonic(), self._acks
                self._acks = self._store.add(_ACKS, 0)
                last_ack = now if self._acks > before else last_ack
                if now - last_ack > _QUIET_S or now - began > _LINGER_S:
                    break
        except RuntimeError as lost:
            logger.debug("the store has ended before every rank acknowledged the failure: %s", lost)

    def _acknowledge(self, store: Store) -> None:
        """Count this rank, once, as one that has received the failure; note how many have."""
        with self._once:
            if not self._acks:
                self._acks = store.add(_ACKS, 1)

    def _listen(self, store: Store) -> None:
        bell = f"failure/bell/{self._rank}"
        try:
            _wait_for_days(store, bell)
            failure = store.get(bell).decode()
            if failure == _CLOSING:
                return
            self.receive(failure)
            self._acknowledge(store)
        except RuntimeError as lost:
            logger.debug("rank %s stops listening for failures, the store has ended: %s", self._rank, lost)
        if self._failure is not None:
            self._on_failure()


def _wait_for_days(store: Store, key: str) -> None:
    """Wait until `key` is set; RuntimeError if the store has ended. One wait of torch may take at most 2**31 ms."""
    while not store.check([key]):
        try:
            store.wait([key], timedelta(days=7))
        except RuntimeError as error:
            logger.debug("waiting for %s ended: %s", key, error)


def _encode_failure(rank: int, error: BaseException) -> str:
    """Return a failure as the text that a board posts; a RemoteError keeps the rank that it came from."""
    if isinstance(error, RemoteError):
        return json.dumps([error.rank, error.message])
    return json.dumps([rank, describe_error(error)])
