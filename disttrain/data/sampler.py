"""Chooses the samples of each step, slot and rank: pure functions of the position, in the form of torch's BatchSampler.

*Contract*: with a global batch size of B, step i of an epoch covers the positions [i*B, (i+1)*B) of that epoch's order.
Slot s is the s-th of its `num_slots` equal parts. Epochs, steps and slots count from 0. Training drops the last samples
of an epoch that do not fill a global batch. Evaluation drops and repeats nothing. A batch is a list of indices with the
seed to load them under, so the process and the time of loading make no difference.

*Errors*: DataError for a dataset that is empty or smaller than a global batch. ConfigError for slots that do not divide
the global batch, and for an order that is none. ValueError for a position outside the epoch, and for slots or ranks
that do not exist.

*Cost*: resuming is arithmetic. Over our own order it takes constant time and memory. Over a batch sampler of another
kind the indices are skipped one by one, but no data is loaded.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from torch.utils.data import BatchSampler

from disttrain.data.order import Order, Sequential, Shuffled
from disttrain.data.order_checks import identify, indices_at
from disttrain.data.permutation import Indices
from disttrain.errors import ConfigError, DataError
from disttrain.seeding import seed_for

POSITIONS_AT_A_TIME = 8192
"""The number of positions for which a sampler asks its order at once, about; each call costs some 60 microseconds."""


class SeededBatch(list[int]):
    """Indices of samples to load together, with the seed to load them under, their epoch, and a name for messages."""

    def __init__(self, indices: list[int], *, seed: int, name: str, epoch: int = 0, run_seed: int = 0) -> None:
        super().__init__(indices)
        self.seed = seed
        self.name = name
        self.epoch = epoch
        self.run_seed = run_seed


class Microbatch(SeededBatch):
    """The indices of the samples of one slot in one step."""

    def __init__(self, indices: list[int], *, seed: int, epoch: int, step: int, slot: int, run_seed: int = 0) -> None:
        name = f"the microbatch of epoch={epoch}, step={step}, slot={slot}"
        super().__init__(indices, seed=seed, name=name, epoch=epoch, run_seed=run_seed)
        self.step = step
        self.slot = slot


class EvaluationBatch(SeededBatch):
    """The indices of one batch of an evaluation; `number` counts the batches of all ranks, from 0."""

    def __init__(self, indices: list[int], *, seed: int, number: int, run_seed: int = 0) -> None:
        super().__init__(indices, seed=seed, name=f"evaluation batch {number}", run_seed=run_seed)
        self.number = number


class SlotBatchSampler(BatchSampler):
    """The microbatches of the slots that one rank owns, in an order that depends only on `seed` and the epoch.

    With `order` an epoch has the positions of that order, and its samples; `num_samples` is the length of the dataset.
    Without, the samples are shuffled, or one after the other.

    *Contract*: a pass (`iter`) yields the microbatches of `slots`, step by step, from the position (`epoch`, `step`) to
    the end of that epoch. A complete pass moves the position to the next epoch. A pass that is left early does not move
    it, so the next pass starts at the same position. `len` is the number of microbatches of a whole epoch. A microbatch
    is a list of `global_batch_size // num_slots` indices, with the seed to load them under. Use the sampler in a
    `SlotLoader`, or as the `batch_sampler` of a DataLoader over a `SeededDataset`.
    *Errors*: DataError for fewer samples than a global batch. ConfigError for slots that do not divide it. ValueError
    for `slots` that are not a part of range(num_slots), and for positions outside an epoch.
    *Cost*: constant time to begin anywhere; some 13 microseconds for each microbatch; memory for about 8,192 indices.
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
        order: Order | None = None,
    ) -> None:
        self.order_identity = {} if order is None else identify(order, num_samples)
        if order is None:
            order = (Shuffled if shuffle else Sequential)(range(num_samples), seed)
        check_sizes(len(order), global_batch_size, num_slots, "an order" if self.order_identity else "a dataset")
        slots = range(num_slots) if slots is None else slots
        if not slots or slots.step != 1 or slots.start < 0 or slots.stop > num_slots:
            raise ValueError(f"expected slots to be a part of range({num_slots}), with at least one slot, got {slots}")
        super().__init__(range(num_samples), global_batch_size // num_slots, drop_last=True)
        self.num_samples = num_samples
        self.num_positions = len(order)
        self.global_batch_size = global_batch_size
        self.num_slots = num_slots
        self.seed = seed
        self.slots = slots
        self.shuffle = shuffle
        self.epoch = 0
        self.step = 0
        self.order = order

    @property
    def num_steps(self) -> int:
        """The number of steps in an epoch."""
        return self.num_positions // self.global_batch_size

    @property
    def num_dropped(self) -> int:
        """The number of positions at the end of an epoch that fill no global batch."""
        return self.num_positions % self.global_batch_size

    def __len__(self) -> int:
        return self.num_steps * len(self.slots)

    def seek(self, epoch: int, step: int) -> None:
        """Let the next pass begin at `step` of `epoch`. The step after the last of an epoch is the next one's first."""
        self.epoch, self.step = self.position(epoch, step)

    def position(self, epoch: int, step: int) -> tuple[int, int]:
        """Return (epoch, step) after a check; the end of an epoch becomes the start of the next."""
        if epoch < 0 or not 0 <= step <= self.num_steps:
            raise ValueError(
                f"there is no epoch={epoch}, step={step}: epochs count from 0, steps from 0 to {self.num_steps}"
            )
        return (epoch + 1, 0) if step == self.num_steps else (epoch, step)

    def batch(self, epoch: int, step: int, slot: int) -> Microbatch:
        """Return the microbatch of any slot, also of a slot that this rank does not own."""
        if epoch < 0 or not 0 <= step < self.num_steps or not 0 <= slot < self.num_slots:
            raise ValueError(
                f"there is no epoch={epoch}, step={step}, slot={slot}: "
                f"an epoch has {self.num_steps} steps, a step {self.num_slots} slots"
            )
        (indices,) = self._indices(epoch, range(step, step + 1), range(slot, slot + 1))
        return self._microbatch(indices, epoch, step, slot)

    def samples(self, epoch: int, steps: range) -> Indices:
        """Return the indices of whole global batches, one batch in each row, the slots in order."""
        positions = np.array(steps)[:, None] * self.global_batch_size + np.arange(self.global_batch_size)
        return indices_at(self.order, self.num_samples, epoch, positions)

    def __iter__(self) -> Iterator[Microbatch]:
        return self.iterate_from(0)

    def iterate_from(self, iteration: int) -> Iterator[Microbatch]:
        """Yield the microbatches of a pass without the first `iteration`, which are skipped in constant time."""
        epoch = self.epoch
        steps, microbatches = divmod(iteration, len(self.slots))
        yield from itertools.islice(self._rest_of(epoch, self.step + steps), microbatches, None)
        self.epoch, self.step = epoch + 1, 0

    def stream(self, epoch: int, step: int) -> Iterator[Microbatch]:
        """Yield this rank's microbatches from `step` of `epoch` on, epoch after epoch, without end."""
        epoch, step = self.position(epoch, step)
        yield from self._rest_of(epoch, step)
        for later in itertools.count(epoch + 1):
            yield from self._rest_of(later, 0)

    def _rest_of(self, epoch: int, first_step: int) -> Iterator[Microbatch]:
        # All ranks' positions count, because some orders compute them too. The first step waits for itself alone.
        most, steps = max(1, POSITIONS_AT_A_TIME // self.global_batch_size), range(first_step, first_step)
        while steps.stop < self.num_steps:
            size = min(2 * len(steps) or 1, most)
            steps = range(steps.stop, min(steps.stop + size, self.num_steps))
            owned = itertools.product(steps, self.slots)
            for (step, slot), indices in zip(owned, self._indices(epoch, steps, self.slots), strict=True):
                yield self._microbatch(indices, epoch, step, slot)

    def _indices(self, epoch: int, steps: range, slots: range) -> list[list[int]]:
        """Return the indices of each slot of `slots` in each step of `steps`, step by step."""
        first = np.array(steps)[:, None] * self.global_batch_size + slots.start * self.batch_size
        positions = first + np.arange(len(slots) * self.batch_size)
        indices = indices_at(self.order, self.num_samples, epoch, positions)
        rows: list[list[int]] = indices.reshape(-1, self.batch_size).tolist()
        return rows

    def _microbatch(self, indices: list[int], epoch: int, step: int, slot: int) -> Microbatch:
        seed = seed_for(self.seed, "batch", epoch, step, slot)
        return Microbatch(indices, seed=seed, epoch=epoch, step=step, slot=slot, run_seed=self.seed)


def check_sizes(num_samples: int, global_batch_size: int, num_slots: int, name: str = "a dataset") -> None:
    """Raise ConfigError if the slots do not divide the global batch, DataError if the samples do not fill one."""
    if num_slots < 1 or global_batch_size < 1:
        raise ConfigError(
            "expected global_batch_size >= 1 and num_slots >= 1; "
            f"got global_batch_size={global_batch_size}, num_slots={num_slots}"
        )
    if global_batch_size % num_slots:
        below = global_batch_size - global_batch_size % num_slots
        sizes = " or ".join(str(size) for size in (below, below + num_slots) if size)
        raise ConfigError(
            f"global_batch_size={global_batch_size} cannot be cut into num_slots={num_slots} equal slots; use {sizes}"
        )
    if num_samples < 1:
        raise DataError(
            "the dataset is empty: expected at least one global batch of samples, got 0; "
            "check that its files were found and that no filter removed every sample"
        )
    if num_samples < global_batch_size:
        largest = num_samples - num_samples % num_slots
        fit = f"a global_batch_size of at most {largest}" if largest else f"a num_slots of at most {num_samples}"
        more = "more data" if name == "a dataset" else "a longer order"
        raise DataError(
            f"expected at least global_batch_size={global_batch_size} samples (one step), got {name} of "
            f"{num_samples}; use {fit}, or {more}"
        )


class ReproducibleBatchSampler(BatchSampler):
    """A batch sampler that can start anywhere in a pass.

    *Contract*: the next pass leaves out the first `start_iteration` batches (None: no batch). Later passes are whole.
    `len` is always that of a whole pass. The batches and their order are the wrapped sampler's. Seed that sampler and
    the draws of the samples yourself, or wrap a `SlotBatchSampler`, which seeds both.
    *Errors*: TypeError for anything but a BatchSampler. ValueError for a negative `start_iteration`. If it is beyond
    the pass, the pass is empty.
    *Cost*: nothing is stored. Skipping takes constant time over a `SlotBatchSampler`. Over another sampler the skipped
    indices are drawn, but their samples are not loaded.
    """

    def __init__(self, batch_sampler: BatchSampler, start_iteration: int | None = None) -> None:
        if not isinstance(batch_sampler, BatchSampler):
            raise TypeError(
                f"expected a torch.utils.data.BatchSampler, got {type(batch_sampler).__name__}; "
                "wrap a sampler of single indices in BatchSampler(sampler, batch_size, drop_last)"
            )
        if start_iteration is not None and start_iteration < 0:
            raise ValueError(f"expected start_iteration >= 0, the number of batches to skip, got {start_iteration}")
        self.batch_sampler = batch_sampler
        self.start_iteration = start_iteration
        # In place of BatchSampler.__init__: the attributes of the wrapped sampler, which a subclass may lack.
        self.sampler = getattr(batch_sampler, "sampler", ())
        self.batch_size = getattr(batch_sampler, "batch_size", 1)
        self.drop_last = getattr(batch_sampler, "drop_last", False)

    def __iter__(self) -> Iterator[list[int]]:
        # A generator, because a DataLoader with workers makes an iterator that it never starts. That iterator must not
        # reset `start_iteration`.
        start, self.start_iteration = self.start_iteration or 0, None
        if isinstance(self.batch_sampler, SlotBatchSampler):
            yield from self.batch_sampler.iterate_from(start)
        else:
            yield from itertools.islice(self.batch_sampler, start, None)

    def __len__(self) -> int:
        return len(self.batch_sampler)


class EvaluationBatchSampler(BatchSampler):
    """This rank's part of the evaluation batches [0, m), [m, 2m), ... of a dataset; each sample is in exactly one.

    *Contract*: the samples, the number and the seed of a batch do not depend on the world size. Rank r of W has the
    batches [N*r//W, N*(r+1)//W) of all N. If there are fewer batches than ranks, some ranks have none. With
    `num_together` a rank has whole groups of so many batches, of which the last may be smaller.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        seed: int = 0,
        num_together: int = 1,
    ) -> None:
        if num_samples < 1:
            raise DataError(
                "the evaluation dataset is empty: expected at least one sample, got 0; "
                "check that its files were found, or leave the evaluation out"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"expected a rank in range(world_size), got rank={rank}, world_size={world_size}")
        super().__init__(range(num_samples), batch_size, drop_last=False)
        self.num_samples = num_samples
        self.seed = seed
        self.num_batches = -(-num_samples // batch_size)
        groups = -(-self.num_batches // num_together)
        start, stop = (groups * each // world_size * num_together for each in (rank, rank + 1))
        self.numbers = range(start, min(stop, self.num_batches))

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for number in self.numbers:
            stop = min((number + 1) * self.batch_size, self.num_samples)
            indices = list(range(number * self.batch_size, stop))
            seed = seed_for(self.seed, "valid", number)
            yield EvaluationBatch(indices, seed=seed, number=number, run_seed=self.seed)
