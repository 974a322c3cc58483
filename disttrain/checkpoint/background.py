"""Saving while the training goes on: copied on the training thread, written and committed by another.

*Contract*: a call returns when the state is copied; what is written is that of the call's moment, the same bytes as
a `DirectorySaver` writes. One save is under way at a time: the next call waits for it. What is to be removed goes
only after the save that came before it is committed. No collective is ever called from the thread.

Every rank calls `poll` at each step's end: where a save has failed they all raise its error there, a step after it
was noticed. `settle` waits for the save under way and raises its error, on every rank. Leaving the context waits
too, without collectives, unless a KeyboardInterrupt said to stop at once.

*Cost*: memory for one copy of the state on rank 0, kept from save to save. While a save is under way each `poll`
asks the ranks once, without waiting.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from disttrain.checkpoint.agree import Ranks, on_one_rank
from disttrain.checkpoint.directory_saver import DirectorySaver
from disttrain.checkpoint.manifest import About
from disttrain.checkpoint.tree import Flat
from disttrain.checkpoint.write import take_apart

logger = logging.getLogger(__name__)

COPYING_THREADS = 4
TOLD_EVERY_S = 5.0
"""How often the ranks that wait for a save hear that it is still under way, so that none takes it for a hang."""


class AskingRanks(Ranks, Protocol):
    """The part of a `Backend` that `poll` needs, too."""

    def start_any(self, flag: bool, /) -> Callable[[], bool]:
        """Start to ask whether any rank says True."""


class Job:
    """One save under way on the rank that writes."""

    def __init__(self, work: Callable[[], None], remove: Callable[[str], None]) -> None:
        self.failure: Exception | None = None
        self._work = work
        self._remove = remove
        self._doomed: list[str] | None = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="disttrain-checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - kept for the training thread, which raises it
            self.failure = error
        with self._lock:
            doomed, self._doomed = self._doomed or [], None
        if self.failure is None:
            for name in doomed:
                self._remove(name)

    def remove_after(self, name: str) -> None:
        """Remove an old checkpoint as soon as this one is committed, and not if it fails."""
        with self._lock:
            if self._doomed is not None:
                self._doomed.append(name)
                return
        if self.failure is None:
            self._remove(name)

    def ended(self, wait_s: float | None = 0.0) -> bool:
        """Return whether it is over, after waiting for that."""
        self._thread.join(wait_s)
        return not self._thread.is_alive()


def _copy(into: Tensor, tensor: Tensor) -> None:
    """Copy the values; from CUDA the stream has to be waited for."""
    if tensor.is_contiguous() and tensor.numel() and tensor.ndim and not (tensor.is_conj() or tensor.is_neg()):
        into, tensor = into.view(torch.uint8), tensor.view(torch.uint8)  # torch 2.9 cannot copy a float4
    into.copy_(tensor, non_blocking=tensor.is_cuda)


class AsynchronousSaver(DirectorySaver):
    """A `DirectorySaver` whose calls return when the state is copied; a context."""

    def __init__(
        self, dirname: str | Path, *, describe: Callable[[], About] = About, backend: AskingRanks | None = None
    ) -> None:
        super().__init__(dirname, describe=describe, backend=backend)
        self._ranks = backend
        self._job: Job | None = None
        self._under_way = False
        self._asked: Callable[[], bool] | None = None
        self._copies: dict[str, Tensor] = {}

    def __call__(self, checkpoint: Any, filename: str, metadata: Mapping[str, Any]) -> None:
        """Wait for the save under way, copy `checkpoint`, and start to save it."""
        step = self._step(filename)
        about = self._describe()
        self.settle()

        def start() -> None:
            flat = self._copied(take_apart(step, checkpoint))
            self._job = Job(lambda: self._write(step, flat, about), super(AsynchronousSaver, self).remove)

        on_one_rank(self._backend, start)
        self._under_way = True

    def remove(self, filename: str) -> None:
        """Remove one checkpoint once the newest is committed."""
        if self._job is not None:
            self._job.remove_after(filename)
        else:
            super().remove(filename)

    def poll(self) -> None:
        """Go on, or raise on every rank why the save under way has failed; called by all at each step's end."""
        if not self._under_way:
            return
        if self._ranks is None:
            if self._job is not None and self._job.ended():
                self.settle()
            return
        if self._asked is not None and self._asked():
            self.settle()
            return
        self._asked = self._ranks.start_any(self._job is not None and self._job.ended())

    def settle(self) -> None:
        """Wait for the save under way, if there is one, on every rank; raise on every rank why it has failed."""
        if not self._under_way:
            return
        if self._asked is not None:
            self._asked()  # what was asked is heard before anything else is
        self._under_way, self._asked = False, None
        while not on_one_rank(self._backend, self._ended):
            logger.debug("waiting for the checkpoint under way")
        self._job = None

    def _ended(self) -> bool:
        if self._job is None or not self._job.ended(TOLD_EVERY_S):
            return self._job is None
        if self._job.failure is not None:
            failure, self._job = self._job.failure, None
            raise failure
        return True

    def _copied(self, flat: Flat) -> Flat:
        """Copy the tensors to the CPU, into the memory of the last copies where it fits."""
        copies: dict[str, Tensor] = {}
        for name, tensor in flat.tensors.items():
            copy = self._copies.get(name)
            if copy is None or (copy.dtype, copy.shape) != (tensor.dtype, tensor.shape):
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[name] = copy
        pairs = [(copies[name], tensor) for name, tensor in flat.tensors.items()]
        with ThreadPoolExecutor(COPYING_THREADS) as pool:  # a run's ranks compute with one thread each, by default
            done = pool.map(lambda pair: _copy(*pair), [pair for pair in pairs if pair[1].device.type == "cpu"])
            for copy, tensor in pairs:
                if tensor.device.type != "cpu":
                    _copy(copy, tensor)  # behind what this thread's stream has still to compute
            list(done)
        for device in {tensor.device for tensor in flat.tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        self._copies = copies
        return Flat(flat.tree, copies)

    def __enter__(self) -> "AsynchronousSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._job is None or (kind is not None and issubclass(kind, KeyboardInterrupt)):
            return
        self._job.ended(None)
        if self._job.failure is not None:
            logger.warning("the last checkpoint was not saved: %s", self._job.failure)
