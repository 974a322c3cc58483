"""Loads the microbatches of this rank's slots, step by step, in this process or in worker processes.

*Contract*: the content of a batch depends only on its position. It does not depend on the number of workers, on
prefetching, or on the batches loaded before. It is loaded with one intra-op thread of torch, in a worker or in this
process, whose number is restored. The global generators are left unchanged. The position of a loader is that of the
batch that it yielded last, not that of the batches that its workers have fetched ahead.

*Errors*: an exception of a sample or of a collate function becomes a `LoadingError` of one line. A worker that dies is
a `DataError`.
"""

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from disttrain.data.copy_ahead import Copies
from disttrain.data.dataset import CollatedDataset
from disttrain.data.fetching import Fetching
from disttrain.data.probes import Probe
from disttrain.data.sampler import EvaluationBatchSampler, Microbatch, SlotBatchSampler
from disttrain.errors import DataError

LoaderT = TypeVar("LoaderT", bound=DataLoader[Any])


@runtime_checkable
class Seekable(Protocol):
    """Data that yields the batches of one epoch in each pass, and can go to any position.

    Epochs and steps count from 0. In data without a `len`, positions are counted in steps only: step 23 of epoch 0 is
    the step after the first 23 steps of the run, in whatever epoch that is.
    """

    def seek(self, epoch: int, step: int) -> None:
        """Set the position: the next pass begins at `step` of `epoch`."""


class StepBatch(list[Any]):
    """The batches of one rank for one step: one for each of its slots, in slot order."""

    def __init__(self, microbatches: Iterable[Any], *, epoch: int, step: int, slots: range) -> None:
        super().__init__(microbatches)
        self.epoch = epoch
        self.step = step
        self.slots = slots


class SlotLoader:
    """Yields a `StepBatch` for each step of the rest of the current epoch. The next pass is the next epoch.

    *Contract*: `epoch` and `step` are the position: the next step. A pass that was left early continues from there.
    `len` is the number of steps in a whole epoch. A `StepBatch` is a list: for each of the sampler's slots, in slot
    order, the samples as `collate_fn` collates them. Workers live across epochs, and fetch the first batches of the
    next epoch while one ends. They end with `close`, with the loader, or with the process. With `copies` the batches
    are on the device. While one step is in use, the next one is fetched and copied; if that raises an error, it comes
    when that step is asked for. The global generators are left unchanged.
    *Errors*: LoadingError (a DataError) of one line for an exception of a sample or of `collate_fn`; DataError for a
    worker that died; ValueError for a position outside an epoch.
    *Cost*: seeking the present position is free; seeking another one restarts the workers. Without workers, each step
    takes some 100 microseconds to keep the global generators, and 15 for each slot to seed them.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: SlotBatchSampler,
        *,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        copies: Copies | None = None,
    ) -> None:
        self.sampler = sampler
        self._copies = copies
        self._ahead: StepBatch | Exception | None = None
        self.epoch, self.step = sampler.position(sampler.epoch, sampler.step)
        self._fetching = Fetching(CollatedDataset(dataset, collate_fn), num_workers, pin_memory)
        # Runs when the loader is collected, and at the interpreter's exit before multiprocessing ends its children.
        weakref.finalize(self, self._fetching.stop)

    def __len__(self) -> int:
        return self.sampler.num_steps

    @property
    def loading_s(self) -> float:
        """The time that this rank has spent so far on loading data, or on waiting for its workers."""
        return self._fetching.took_s

    @property
    def notes(self) -> list[str]:
        """Facts about the reading of this data that a person should know."""
        dropped, size = self.sampler.num_dropped, self.sampler.global_batch_size
        left_out = f"each epoch leaves out {dropped} of {self.sampler.num_samples} samples, another choice each time"
        if self.sampler.order_identity:
            left_out = f"each epoch leaves out the last {dropped} of the order's {self.sampler.num_positions} positions"
        return [f"{left_out}: they fill no global batch of {size}"] if dropped else []

    def seek(self, epoch: int, step: int) -> None:
        """Set the position to `step` of `epoch`. The step after the last of an epoch is the first of the next."""
        position = self.sampler.position(epoch, step)
        if position != (self.epoch, self.step):
            self.close()
            self.epoch, self.step = position

    def load_probes(self, probes: Sequence[Probe]) -> list[str]:
        """Return the digests of single samples, loaded where the next steps are loaded; the position stays.

        So a file that a sample opens is not shared with workers that are forked later.
        """
        self.close()
        self._fetching.start(_Microbatches(self.sampler, self.epoch, self.step, probes))
        return self._fetching.take(len(probes))

    @property
    def iteration(self) -> int:
        """The number of steps before the position, over all epochs. Inside a loop it is the step's number, from 1."""
        return self.epoch * len(self) + self.step

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the sizes that it refers to: everything that a loop must save about its data."""
        return {"epoch": self.epoch, "step": self.step, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        names = ("num_samples", "global_batch_size", "num_slots", "seed", "shuffle")
        return {**{name: getattr(self.sampler, name) for name in names}, **self.sampler.order_identity}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the position at which `state_dict` was called, on any number of ranks and workers.

        *Errors*: DataError if another number of samples or slots, batch size, seed or order would give other batches.
        """
        saved = {name: value for name, value in state_dict.items() if name not in ("epoch", "step")}
        identity = self._identity()
        present = {name: identity.get(name) for name in [*saved, *self.sampler.order_identity]}
        if saved != present:
            raise DataError(
                f"the batches would be others than before: expected {saved}, got {present}; set the former values"
            )
        self.seek(state_dict["epoch"], state_dict["step"])

    def __iter__(self) -> Iterator[StepBatch]:
        epoch = self.epoch
        while self.epoch == epoch:
            yield self._next()

    def close(self) -> None:
        """End the workers. The position stays, and the loader starts new workers if it is used again."""
        self._fetching.stop()
        self._ahead = None

    def _next(self) -> StepBatch:
        following = self.sampler.position(self.epoch, self.step + 1)
        if self._copies is None:
            batch = self._fetch(self.epoch, self.step)
        else:
            ahead, self._ahead = self._ahead or self._start(self._copies, self.epoch, self.step), None
            if isinstance(ahead, Exception):
                raise ahead
            batch = ahead
            self._copies.finish()
            self._ahead = self._start(self._copies, *following)
        self.epoch, self.step = following
        return batch

    def _start(self, copies: Copies, epoch: int, step: int) -> StepBatch | Exception:
        """Fetch a step and start its copy; return an exception, because it belongs to that step, not to the present."""
        try:
            batch = self._fetch(epoch, step)
            return StepBatch(copies.start(list(batch)), epoch=epoch, step=step, slots=batch.slots)
        except Exception as error:  # noqa: BLE001 - `_next` raises it when that step is next
            return error

    def _fetch(self, epoch: int, step: int) -> StepBatch:
        if not self._fetching.started:
            self._fetching.start(_Microbatches(self.sampler, epoch, step))
        slots = self.sampler.slots
        return StepBatch(self._fetching.take(len(slots)), epoch=epoch, step=step, slots=slots)


class _Microbatches:
    """Probes, then the endless microbatches of a slot sampler; an iterable: a DataLoader makes two iterators of it."""

    def __init__(self, sampler: SlotBatchSampler, epoch: int, step: int, probes: Sequence[Probe] = ()) -> None:
        self.sampler, self.epoch, self.step, self.probes = sampler, epoch, step, probes

    def __iter__(self) -> Iterator[Microbatch | Probe]:
        return itertools.chain(self.probes, self.sampler.stream(self.epoch, self.step))


def evaluation_loader(
    dataset: Any,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    seed: int = 0,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    pin_memory: bool = False,
    num_together: int = 1,
) -> Iterator[tuple[int, Any]]:
    """Return an iterator over (batch number, batch) of this rank's part of an evaluation; see `EvaluationBatchSampler`.

    Over all ranks each number comes once, so losses can be added in the order of the batches. The workers end with the
    last batch, or with the iterator.
    """
    sampler = EvaluationBatchSampler(len(dataset), batch_size, rank, world_size, seed=seed, num_together=num_together)
    fetching = Fetching(CollatedDataset(dataset, collate_fn), min(num_workers, len(sampler)), pin_memory)
    return _evaluation_batches(sampler, fetching)


def evaluation_probes(dataset: Any, probes: Sequence[Probe], num_workers: int) -> Callable[[], list[str]]:
    """Start to load probes of an evaluation's dataset; return the function that waits for their digests.

    They are loaded by a worker if an evaluation uses workers: a file that a sample opens must not be shared with them.
    """
    fetching = Fetching(CollatedDataset(dataset), min(num_workers, 1), pin_memory=False)
    fetching.start(probes)

    def wait() -> list[str]:
        try:
            return fetching.take(len(probes))
        finally:
            fetching.stop()

    return wait


def _evaluation_batches(sampler: EvaluationBatchSampler, fetching: Fetching) -> Iterator[tuple[int, Any]]:
    if len(sampler):
        fetching.start(sampler)
    try:
        for number in sampler.numbers:
            (batch,) = fetching.take(1)
            yield number, batch
    finally:
        fetching.stop()


def update_dataloader(dataloader: LoaderT, new_batch_sampler: BatchSampler) -> LoaderT:
    """Return a DataLoader of the same class and options, with the batches of `new_batch_sampler`.

    It is a copy, so attributes of a subclass or of a later torch are kept too. Persistent workers are not shared.
    """
    if isinstance(dataloader.dataset, IterableDataset):
        raise ValueError(
            "expected a DataLoader over a map-style dataset, got one over an IterableDataset, "
            "which has no indices for a batch sampler; give a map-style dataset"
        )
    updated = copy.copy(dataloader)
    # Not by setattr: DataLoader.__setattr__ refuses to change the batches of a loader that may be running.
    vars(updated).update(batch_sampler=new_batch_sampler, batch_size=None, drop_last=False, _iterator=None)
    return updated
