"""What goes into a step: the microbatches of this rank's slots, loaded here or in worker processes.

*Contract*: what a batch holds depends on its position alone, never on the number of workers, on prefetching or on
what was loaded before; the loading process uses one intra-op thread in a worker, and what it finds here. The
global generators are left as they were found. A loader's position is what it has yielded, not what its workers
have fetched ahead.

*Errors*: whatever a sample or a collate function raises comes as a `LoadingError` of one line; a worker that dies
as a `DataError`.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.context import BaseContext
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from disttrain.data.ahead import Copies
from disttrain.data.dataset import CollatedDataset
from disttrain.data.fetching import Fetching
from disttrain.data.sampler import EvaluationBatchSampler, Microbatch, SlotBatchSampler
from disttrain.errors import DataError

LoaderT = TypeVar("LoaderT", bound=DataLoader[Any])


@runtime_checkable
class Seekable(Protocol):
    """Data that yields an epoch's batches in a pass and can go to any position, both counted from 0.

    Data without a `len` is sought by steps alone: step 23 of epoch 0 is the 23rd of all, whatever epoch that is in.
    """

    def seek(self, epoch: int, step: int) -> None:
        """Let the next pass begin at `step` of `epoch`."""


class StepBatch(list[Any]):
    """What one rank loads for one step: a batch for each of its slots, in slot order."""

    def __init__(self, microbatches: Iterable[Any], *, epoch: int, step: int, slots: range) -> None:
        super().__init__(microbatches)
        self.epoch = epoch
        self.step = step
        self.slots = slots


class SlotLoader:
    """Yields a `StepBatch` a step, for the rest of the current epoch; the next pass is the next epoch.

    *Contract*: `epoch` and `step` are the position: the step that comes next. A pass that was left early goes on
    where it was left. `len` is the number of steps of a whole epoch. Workers live across epochs and fetch the
    next one's first batches while this one ends; they end with `close`, with the loader or with the process.
    With `copies` the batches come on the device, and the step after is fetched and on its way there when one is
    yielded; what it raises is raised in its turn.

    A `StepBatch` is a list with what `collate_fn` makes of the samples of each of the sampler's slots, in slot order.
    The global generators are left as they were found.
    *Errors*: LoadingError (a DataError) of one line for what a sample or `collate_fn` raises; DataError for a worker
    that died; ValueError for a position outside an epoch.
    *Cost*: seeking where the loader stands already is free; elsewhere the workers start anew. Without workers a
    step costs some 100 microseconds to keep the global generators, and 15 a slot to seed them.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: SlotBatchSampler,
        *,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        multiprocessing_context: str | BaseContext | None = None,
        copies: Copies | None = None,
    ) -> None:
        self.sampler = sampler
        self._copies = copies
        self._ahead: StepBatch | Exception | None = None
        self.epoch, self.step = sampler.position(sampler.epoch, sampler.step)
        collated = CollatedDataset(dataset, collate_fn)
        self._fetching = Fetching(collated, num_workers, pin_memory, prefetch_factor, multiprocessing_context)
        # Runs when the loader is collected and, before multiprocessing ends what is left, at the interpreter's exit.
        weakref.finalize(self, self._fetching.stop)

    def __len__(self) -> int:
        return self.sampler.num_steps

    @property
    def loading_s(self) -> float:
        """Time in which this rank loaded data, or waited for its workers to, so far."""
        return self._fetching.took_s

    @property
    def notes(self) -> list[str]:
        """What a person should know of how this data is read."""
        dropped, size = self.sampler.num_dropped, self.sampler.global_batch_size
        left_out = f"each epoch leaves out {dropped} of {self.sampler.num_samples} samples, another choice each time"
        return [f"{left_out}: they fill no global batch of {size}"] if dropped else []

    def seek(self, epoch: int, step: int) -> None:
        """Go to `step` of `epoch`; the step after an epoch's last is the next epoch's first."""
        position = self.sampler.position(epoch, step)
        if position != (self.epoch, self.step):
            self.close()
            self.epoch, self.step = position

    @property
    def iteration(self) -> int:
        """Steps that lie before the position, over all epochs: inside a loop the number of its step, from 1."""
        return self.epoch * len(self) + self.step

    def state_dict(self) -> dict[str, int]:
        """Return the position and what it is a position of: all that a loop has to save of its data."""
        sampler = self.sampler
        order = ("num_samples", "global_batch_size", "num_slots", "seed", "shuffle")
        return {"epoch": self.epoch, "step": self.step, **{name: getattr(sampler, name) for name in order}}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go to where `state_dict` was called, with any number of ranks and workers.

        *Errors*: DataError where another number of samples or slots, batch size or seed gives other batches.
        """
        order = {name: value for name, value in state_dict.items() if name not in ("epoch", "step")}
        mine = {name: getattr(self.sampler, name, None) for name in order}
        if order != mine:
            raise DataError(f"the batches would be others than before: expected {order}, got {mine}; go back to those")
        self.seek(state_dict["epoch"], state_dict["step"])

    def __iter__(self) -> Iterator[StepBatch]:
        epoch = self.epoch
        while self.epoch == epoch:
            yield self._next()

    def close(self) -> None:
        """End the workers; the loader stays where it stands and starts new ones if it is used again."""
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
        """Fetch a step and start its way to the device; what is raised belongs to that step, not to the one before."""
        try:
            batch = self._fetch(epoch, step)
            return StepBatch(copies.start(list(batch)), epoch=epoch, step=step, slots=batch.slots)
        except Exception as error:  # noqa: BLE001 - raised in its turn
            return error

    def _fetch(self, epoch: int, step: int) -> StepBatch:
        if not self._fetching.started:
            self._fetching.start(_Stream(self.sampler, epoch, step))
        slots = self.sampler.slots
        return StepBatch(self._fetching.take(len(slots)), epoch=epoch, step=step, slots=slots)


class _Stream:
    """A slot sampler's endless stream, as the iterable that a DataLoader wants (it begins one twice)."""

    def __init__(self, sampler: SlotBatchSampler, epoch: int, step: int) -> None:
        self.sampler, self.epoch, self.step = sampler, epoch, step

    def __iter__(self) -> Iterator[Microbatch]:
        return self.sampler.stream(self.epoch, self.step)


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
    prefetch_factor: int | None = None,
    multiprocessing_context: str | BaseContext | None = None,
) -> Iterator[tuple[int, Any]]:
    """Return (batch number, batch) of this rank's part of one evaluation; see `EvaluationBatchSampler`.

    Over all ranks each number comes once, so that losses can be folded in the batches' order. Workers end with
    the last batch, or with the iterator.
    """
    sampler = EvaluationBatchSampler(len(dataset), batch_size, rank, world_size, seed=seed)
    collated, num_workers = CollatedDataset(dataset, collate_fn), min(num_workers, len(sampler))
    fetching = Fetching(collated, num_workers, pin_memory, prefetch_factor, multiprocessing_context)
    return _evaluation_batches(sampler, fetching)


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
    """Return a DataLoader of the same class and options whose batches are those of `new_batch_sampler`.

    It is a copy, so what a subclass or a later torch adds is kept too; persistent workers are not shared.
    """
    if isinstance(dataloader.dataset, IterableDataset):
        raise ValueError(
            "expected a DataLoader over a map-style dataset, got one over an IterableDataset, "
            "which has no indices that a batch sampler could choose from"
        )
    updated = copy.copy(dataloader)
    # Past __setattr__, which forbids what is done here: to change how a loader that may be running makes batches.
    vars(updated).update(batch_sampler=new_batch_sampler, batch_size=None, drop_last=False, _iterator=None)
    return updated
