"""An engine whose batches are a function of a seed and the iteration, so that a resumed run sees the same ones.

    at STARTED: seed = a draw from torch's generator     # rank 0's on every rank; a loaded seed is kept
    whenever an iterator is taken:                       # a pass over the data begins
        manual_seed(seed + iteration // len(data))
        iter(data)
    at the start of a run inside a pass:
        the same, for the iteration at which the pass began
        skip the batches that are done
        restore the saved states of the generators

*Contract*: `Seekable` data skips batches by a seek, and its batch is a function of the iteration alone. A DataLoader
over a map-style dataset skips indices and loads no sample for them. All other data is fetched and dropped. A
DataLoader's own generators are seeded like the global ones. The state dict adds `rng_states` (may be None) to the
engine's, and may hold `seed` and `pass_started`, the iteration at which the pass began. `torch.load(weights_only=True)`
reads it. An engine that runs inside a handler of another one restores the global generators at its end. An interrupted
engine continues with its own generators' states.

After a resume inside a pass, the worker processes of a foreign DataLoader draw other numbers, since each worker begins
anew. Our loader (`Seekable`) seeds every microbatch by its position. This module does not make kernels deterministic.

*Errors*: ValueError for a run without data.
"""

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from disttrain.backend.base import Backend
from disttrain.data.loader import Seekable, update_dataloader
from disttrain.data.sampler import ReproducibleBatchSampler
from disttrain.engine.engine import Engine
from disttrain.engine.events import Events
from disttrain.seeding import get_random_state, keep_random_state, manual_seed, set_random_state

__all__ = ["DeterministicEngine", "ReproducibleBatchSampler", "keep_random_state", "update_dataloader"]

_NO_MORE = object()
_inside_a_run: ContextVar[bool] = ContextVar("_inside_a_run", default=False)
"""Whether a deterministic engine runs around this code; an engine inside its handler then restores the generators."""


class DeterministicEngine(Engine):
    """An `Engine` over reproducible batches. Rank 0 of `backend` draws the seed.

    *Contract*: a run that continues from a `state_dict`, inside a pass too, gets the batches of the uninterrupted run,
    and the same states of the global generators. `state.seed` is drawn from torch's generator when a run begins. With a
    `SlotLoader` the samples' own randomness is the same too. With a foreign DataLoader with workers it is not, if the
    resume is inside a pass. `make_deterministic` makes kernels deterministic; the engine does not.
    *Errors*: ValueError for a run without data.
    *Cost*: seeding at the start of each pass, 0.1 to 0.2 ms. A resume costs nothing with a `SlotLoader`, the skipped
    indices with a map-style DataLoader, and all batches since the pass began with data that can only be iterated.
    """

    def __init__(self, process_function: Callable[[Self, Any], Any], *, backend: Backend | None = None) -> None:
        super().__init__(process_function)
        self._backend = backend
        self._seed_is_given = False
        self._pass_started: int | None = None
        self._random_state_when_paused: dict[str, Any] | None = None
        self.state.rng_states = None
        self.state_dict_user_keys.append("rng_states")
        self.add_event_handler(Events.STARTED, _take_seed)

    @contextmanager
    def _around_run(self, data: Iterable[Any] | None) -> Iterator[None]:
        """Refuse a run without data; restore an outer run's generators at the end, a paused run's at the start."""
        paused = self._cursor is not None
        if data is None and not paused:
            raise ValueError("expected data, got None; an engine without data has no batches to reproduce, use Engine")
        outer = get_random_state() if _inside_a_run.get() else None
        if paused and self._random_state_when_paused is not None:
            set_random_state(self._random_state_when_paused)
        token = _inside_a_run.set(True)
        try:
            yield
        finally:
            _inside_a_run.reset(token)
            self._random_state_when_paused = None if self._cursor is None else get_random_state()
            if outer is not None:
                set_random_state(outer)

    def state_dict(self) -> dict[str, Any]:
        """Return the engine's state dict, the seed, the iteration of the pass's start and the generators' states."""
        added = {"rng_states": get_random_state(), "seed": self.state.seed, "pass_started": self._pass_started}
        return {**super().state_dict(), **added}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next `run` continue from a `state_dict`. If that holds no seed, STARTED draws one."""
        super().load_state_dict(state_dict)
        self.state.seed = state_dict.get("seed")
        self._seed_is_given = self.state.seed is not None
        self._pass_started = state_dict.get("pass_started")

    def _iterate(self, first: bool) -> Iterator[Any]:
        """Return an iterator over the pass that begins now; at a run's start, over the rest of the pass it is in."""
        state = self.state
        data = state.dataloader = _with_skipping(state.dataloader)
        length = _length(data)
        pass_started = self._pass_started = self._start_of_pass(length) if first else state.iteration
        done = state.iteration - pass_started
        saved_states, state.rng_states = state.rng_states if first and done else None, None
        self._reseed(data, pass_started)
        iterator: Iterator[Any]
        if _is_seekable(data):
            data.seek(*divmod(state.iteration, length or state.iteration + 1))
            iterator = iter(data)
        elif _skips_indices(data):
            order = data.batch_sampler.batch_sampler
            if _is_seekable(order):  # our own order, which draws nothing
                order.seek(pass_started // len(order), 0)
            elif saved_states is not None:
                _RestoreAfterSkip(data.batch_sampler, done, saved_states)
                saved_states = None
            data.batch_sampler.start_iteration = done
            iterator = iter(data)
        else:
            iterator = self._fetch_and_drop(data, done)
        if saved_states is not None:
            set_random_state(saved_states)
        return iterator

    def _start_of_pass(self, length: int | None) -> int:
        """Return the iteration at which the run's current pass began: the saved one, else the one by the length."""
        iteration, saved = self.state.iteration, self._pass_started
        if iteration == 0:
            return 0
        if length is None:
            return saved if saved is not None and saved <= iteration else 0
        if saved is None or not 0 <= iteration - saved <= length:
            return iteration - iteration % length
        return saved if iteration - saved < length else iteration

    def _reseed(self, data: Any, iteration: int) -> None:
        seed = (self.state.seed or 0) + iteration // (_length(data) or self.state.epoch_length or 1)
        manual_seed(seed)
        for generator in _generators(data):
            generator.manual_seed(seed)
        if getattr(data, "_iterator", None) is not None:
            # Persistent workers got their seed when they started. That took a draw, which every pass must repeat.
            torch.empty((), dtype=torch.int64).random_(generator=data.generator)

    def _fetch_and_drop(self, data: Iterable[Any], count: int) -> Iterator[Any]:
        """Return an iterator from which `count` batches have been dropped, over several passes if need be."""
        if count:
            self.logger.info("fetching and dropping %d batches to reach iteration %d", count, self.state.iteration)
        iterator, first_dropped = iter(data), self.state.iteration - count
        dropped = 0
        while dropped < count:
            if next(iterator, _NO_MORE) is not _NO_MORE:
                dropped += 1
            elif self._pass_started == first_dropped + dropped:
                break  # the pass is empty; the loop will notice it and warn
            else:
                self._pass_started = first_dropped + dropped
                self._reseed(data, self._pass_started)
                iterator = iter(data)
        return iterator


class _RestoreAfterSkip(BatchSampler):
    """Replaces a batch sampler for one pass and restores the generators' states after `count` batches.

    The first batch draws the order, after `iter(loader)`. The states must be restored before the samples of the next
    batch are loaded.
    """

    def __init__(self, holder: ReproducibleBatchSampler, count: int, states: dict[str, Any]) -> None:
        self._holder, self._wrapped, self._count, self._states = holder, holder.batch_sampler, count, states
        holder.batch_sampler = self

    def __len__(self) -> int:
        return len(self._wrapped)

    def __iter__(self) -> Iterator[list[int]]:
        self._holder.batch_sampler = self._wrapped
        batches = iter(self._wrapped)
        yield from itertools.islice(batches, self._count)
        set_random_state(self._states)
        yield from batches


def _take_seed(engine: DeterministicEngine) -> None:
    """Draw the run's seed, the same on every rank. A run that continues keeps its seed."""
    if engine.state.seed is None or (engine.state.iteration == 0 and not engine._seed_is_given):
        seed = int(torch.randint(0, 10**9, (1,)).item())
        engine.state.seed = seed if engine._backend is None else engine._backend.broadcast(seed)
    engine._seed_is_given = False


def _length(data: Any) -> int | None:
    """Return `len(data)`, or None if it is unknown or 0."""
    try:
        return len(data) or None
    except TypeError:
        return None


def _is_seekable(data: Any) -> bool:
    return isinstance(data, Seekable) and not isinstance(data, io.IOBase)


def _skips_indices(data: Any) -> bool:
    return isinstance(data, DataLoader) and isinstance(data.batch_sampler, ReproducibleBatchSampler)


def _with_skipping(data: Any) -> Any:
    """Return a map-style DataLoader with its batch sampler wrapped once; return other data unchanged."""
    wrappable = (
        isinstance(data, DataLoader)
        and not isinstance(data.dataset, IterableDataset)
        and isinstance(data.batch_sampler, BatchSampler)
    )
    if not wrappable or _is_seekable(data) or _skips_indices(data):
        return data
    return update_dataloader(data, ReproducibleBatchSampler(data.batch_sampler))


def _generators(data: Any) -> list[torch.Generator]:
    """Return the generators that were passed to a DataLoader and its samplers, each once."""
    if not isinstance(data, DataLoader):
        return []
    batch_sampler = data.batch_sampler
    holders = (data, data.sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    generators = [getattr(holder, "generator", None) for holder in holders]
    return [generator for generator in dict.fromkeys(generators) if isinstance(generator, torch.Generator)]
