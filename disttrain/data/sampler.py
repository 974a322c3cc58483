"""Which samples each step, slot and rank loads: pure functions of position, in torch's BatchSampler form.

*Contract*: step i of an epoch covers positions [i*B, (i+1)*B) of that epoch's order, B the global batch size, and
slot s the s-th of its `num_slots` equal parts. Epochs, steps and slots count from 0. The tail that fills no
global batch is dropped in training; evaluation drops and repeats nothing. Batches are lists of indices that
carry the seed to load them with, so it makes no difference which process loads them, or when.

*Errors*: a dataset that is empty or smaller than a global batch: DataError; slots that do not divide the global
batch: ConfigError; a position outside the epoch, or slots and ranks that do not exist: ValueError.

*Cost*: resuming anywhere is arithmetic: constant time and memory over our own order, and over a foreign batch
sampler the skipping of its indices, never of data.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler

from disttrain.data.permutation import IndexShuffle
from disttrain.errors import ConfigError, DataError
from disttrain.seeding import seed_for

INDICES_AT_A_TIME = 8192
"""An iterating sampler asks the order for about so many indices at once: each call costs some 60 microseconds."""


class SeededBatch(list[int]):
    """Indices to load together, the seed to load them with, and a name for them in messages."""

    def __init__(self, indices: list[int], *, seed: int, name: str) -> None:
        super().__init__(indices)
        self.seed = seed
        self.name = name


class Microbatch(SeededBatch):
    """The samples of one slot in one step."""

    def __init__(self, indices: list[int], *, seed: int, epoch: int, step: int, slot: int) -> None:
        super().__init__(indices, seed=seed, name=f"the microbatch of epoch={epoch}, step={step}, slot={slot}")
        self.epoch = epoch
        self.step = step
        self.slot = slot


class EvaluationBatch(SeededBatch):
    """The samples of one batch of an evaluation; `number` counts over all ranks' batches."""

    def __init__(self, indices: list[int], *, seed: int, number: int) -> None:
        super().__init__(indices, seed=seed, name=f"evaluation batch {number}")
        self.number = number


class SlotBatchSampler(BatchSampler):
    """The microbatches of the slots that one rank owns, in an order that `seed` and the epoch alone decide.

    *Contract*: a pass (`iter`) yields the microbatches of `slots`, step by step, from the position
    (`epoch`, `step`) to the end of that epoch. A pass that has ended moves the position to the next epoch; one
    that was left earlier does not move it, so the next starts again from the same place. `len` is the number of
    microbatches of a whole epoch. A microbatch is a list of `global_batch_size // num_slots` indices with the seed to
    load them under: give it to a `SlotLoader`, or with a `SeededDataset` to a DataLoader, as its `batch_sampler`.
    *Errors*: DataError for fewer samples than a global batch, ConfigError for slots that do not divide it, ValueError
    for `slots` that are no part of range(num_slots) and for positions outside an epoch.
    *Cost*: constant time to begin anywhere; some 13 microseconds a microbatch, and memory for about 8,192 indices.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        num_slots: int = 1,
        *,
        seed: int = 0,
        slots: range | None = None,
        shuffle: bool = True,
    ) -> None:
        check_sizes(num_samples, global_batch_size, num_slots)
        slots = range(num_slots) if slots is None else slots
        if not slots or slots.step != 1 or slots.start < 0 or slots.stop > num_slots:
            raise ValueError(f"slots must be a part of range({num_slots}), at least one of them, got {slots}")
        super().__init__(range(num_samples), global_batch_size // num_slots, drop_last=True)
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.num_slots = num_slots
        self.seed = seed
        self.slots = slots
        self.shuffle = shuffle
        self.epoch = 0
        self.step = 0
        self._order: tuple[int, IndexShuffle] | None = None

    @property
    def num_steps(self) -> int:
        """Steps in an epoch."""
        return self.num_samples // self.global_batch_size

    @property
    def num_dropped(self) -> int:
        """Samples at the end of each epoch's order that fill no global batch; other ones each epoch."""
        return self.num_samples % self.global_batch_size

    def __len__(self) -> int:
        return self.num_steps * len(self.slots)

    def seek(self, epoch: int, step: int) -> None:
        """Let the next pass begin at `step` of `epoch`; the step after an epoch's last is the next one's first."""
        self.epoch, self.step = self.position(epoch, step)

    def position(self, epoch: int, step: int) -> tuple[int, int]:
        """Return (epoch, step), checked, the end of an epoch written as the start of the next."""
        if epoch < 0 or not 0 <= step <= self.num_steps:
            raise ValueError(
                f"there is no epoch={epoch}, step={step}: epochs count from 0, steps from 0 to {self.num_steps}"
            )
        return (epoch + 1, 0) if step == self.num_steps else (epoch, step)

    def batch(self, epoch: int, step: int, slot: int) -> Microbatch:
        """Return the microbatch of one slot, owned or not."""
        if epoch < 0 or not 0 <= step < self.num_steps or not 0 <= slot < self.num_slots:
            raise ValueError(
                f"there is no epoch={epoch}, step={step}, slot={slot}: "
                f"an epoch has {self.num_steps} steps, a step {self.num_slots} slots"
            )
        (indices,) = self._indices(epoch, range(step, step + 1), range(slot, slot + 1))
        return self._microbatch(indices, epoch, step, slot)

    def samples(self, epoch: int, steps: range) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the indices of whole global batches, one a row, those of all slots in slot order."""
        positions = np.array(steps)[:, None] * self.global_batch_size + np.arange(self.global_batch_size)
        return self._order_of(epoch).at(positions) if self.shuffle else positions

    def __iter__(self) -> Iterator[Microbatch]:
        return self.iterate_from(0)

    def iterate_from(self, iteration: int) -> Iterator[Microbatch]:
        """Make a pass without its first `iteration` microbatches, in constant time."""
        epoch = self.epoch
        steps, microbatches = divmod(iteration, len(self.slots))
        yield from itertools.islice(self._rest_of(epoch, self.step + steps), microbatches, None)
        self.epoch, self.step = epoch + 1, 0

    def stream(self, epoch: int, step: int) -> Iterator[Microbatch]:
        """Yield the owned microbatches from `step` of `epoch` on, epoch after epoch, without end."""
        epoch, step = self.position(epoch, step)
        yield from self._rest_of(epoch, step)
        for later in itertools.count(epoch + 1):
            yield from self._rest_of(later, 0)

    def _rest_of(self, epoch: int, first_step: int) -> Iterator[Microbatch]:
        at_a_time = max(1, INDICES_AT_A_TIME // (len(self.slots) * self.batch_size))
        for start in range(first_step, self.num_steps, at_a_time):
            steps = range(start, min(start + at_a_time, self.num_steps))
            owned = itertools.product(steps, self.slots)
            for (step, slot), indices in zip(owned, self._indices(epoch, steps, self.slots), strict=True):
                yield self._microbatch(indices, epoch, step, slot)

    def _indices(self, epoch: int, steps: range, slots: range) -> list[list[int]]:
        """Return the indices of each of `steps` and, within it, of each of `slots`."""
        first = np.array(steps)[:, None] * self.global_batch_size + slots.start * self.batch_size
        positions = first + np.arange(len(slots) * self.batch_size)
        indices = self._order_of(epoch).at(positions) if self.shuffle else positions
        rows: list[list[int]] = indices.reshape(-1, self.batch_size).tolist()
        return rows

    def _order_of(self, epoch: int) -> IndexShuffle:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, IndexShuffle(self.num_samples, seed_for(self.seed, "order", epoch)))
        return self._order[1]

    def _microbatch(self, indices: list[int], epoch: int, step: int, slot: int) -> Microbatch:
        seed = seed_for(self.seed, "batch", epoch, step, slot)
        return Microbatch(indices, seed=seed, epoch=epoch, step=step, slot=slot)


def check_sizes(num_samples: int, global_batch_size: int, num_slots: int) -> None:
    """Raise ConfigError where the slots do not divide the global batch, DataError where there is not one such."""
    if num_slots < 1 or global_batch_size < 1:
        raise ConfigError(
            f"global_batch_size and num_slots must be at least 1, "
            f"got global_batch_size={global_batch_size}, num_slots={num_slots}"
        )
    if global_batch_size % num_slots:
        below = global_batch_size - global_batch_size % num_slots
        fits = " or ".join(str(size) for size in (below, below + num_slots) if size)
        raise ConfigError(
            f"global_batch_size={global_batch_size} cannot be cut into num_slots={num_slots} equal slots; use {fits}"
        )
    if num_samples < 1:
        raise DataError(
            "the dataset is empty: expected at least one global batch of samples, got 0; "
            "check that its files were found and that no filter took every sample"
        )
    if num_samples < global_batch_size:
        largest = num_samples - num_samples % num_slots
        fit = f"a global_batch_size of at most {largest}" if largest else f"a num_slots of at most {num_samples}"
        raise DataError(
            f"the dataset has {num_samples} samples, fewer than global_batch_size={global_batch_size}: "
            f"not one step could be made; use {fit}, or more data"
        )


class ReproducibleBatchSampler(BatchSampler):
    """A batch sampler that can start anywhere in a pass.

    *Contract*: the next pass leaves out the first `start_iteration` batches (None: none); that holds for this one
    pass. `len` stays that of the whole. The batches are the wrapped sampler's, which draws its order as it always
    does: seed that, and what the samples draw, by yourself, or wrap a `SlotBatchSampler`.
    *Errors*: TypeError for anything but a BatchSampler, ValueError for a negative `start_iteration`; one beyond the
    pass makes it empty.
    *Cost*: nothing is stored; constant time over a `SlotBatchSampler`, else the drawing of the indices that are left
    out, never the loading of their samples.
    """

    def __init__(self, batch_sampler: BatchSampler, start_iteration: int | None = None) -> None:
        if not isinstance(batch_sampler, BatchSampler):
            raise TypeError(
                f"expected a torch.utils.data.BatchSampler, got {type(batch_sampler).__name__}; "
                "wrap a sampler of single indices in BatchSampler(sampler, batch_size, drop_last)"
            )
        if start_iteration is not None and start_iteration < 0:
            raise ValueError(f"start_iteration counts batches from 0, got {start_iteration}")
        self.batch_sampler = batch_sampler
        self.start_iteration = start_iteration
        # In place of BatchSampler's own set-up: what the wrapped one says of its batches, which a subclass may lack.
        self.sampler = getattr(batch_sampler, "sampler", ())
        self.batch_size = getattr(batch_sampler, "batch_size", 1)
        self.drop_last = getattr(batch_sampler, "drop_last", False)

    def __iter__(self) -> Iterator[list[int]]:
        # A generator: a DataLoader with workers makes an iterator that it never starts, which must not use this up.
        start, self.start_iteration = self.start_iteration or 0, None
        if isinstance(self.batch_sampler, SlotBatchSampler):
            yield from self.batch_sampler.iterate_from(start)
        else:
            yield from itertools.islice(self.batch_sampler, start, None)

    def __len__(self) -> int:
        return len(self.batch_sampler)


class EvaluationBatchSampler(BatchSampler):
    """This rank's part of the batches [0, m), [m, 2m), ... of a whole dataset, each sample in exactly one.

    *Contract*: what a batch holds, its number and its seed do not depend on the world size. Rank r of W has the
    batches [N*r//W, N*(r+1)//W) of all N, whole; with fewer batches than ranks some have none.
    """

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, world_size: int = 1, *, seed: int = 0) -> None:
        if num_samples < 1:
            raise DataError(
                "the evaluation dataset is empty: expected at least one sample, got 0; "
                "check that its files were found, or leave it out"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in range(world_size), got rank={rank}, world_size={world_size}")
        super().__init__(range(num_samples), batch_size, drop_last=False)
        self.num_samples = num_samples
        self.seed = seed
        self.num_batches = -(-num_samples // batch_size)
        self.numbers = range(self.num_batches * rank // world_size, self.num_batches * (rank + 1) // world_size)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for number in self.numbers:
            stop = min((number + 1) * self.batch_size, self.num_samples)
            indices = list(range(number * self.batch_size, stop))
            yield EvaluationBatch(indices, seed=seed_for(self.seed, "valid", number), number=number)
