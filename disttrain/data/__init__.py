"""WHAT goes into a step: the order of the samples, the samples of each slot, and their loading.

    permutation    `IndexShuffle`: a random order of n samples, computed slice by slice
    order          `Order`: which sample is at which position of an epoch; shuffled and sequential
    order_checks   checks and identifies an order
    weighted_order `Weighted`: samples drawn with replacement, each with its own probability
    length_buckets `LengthBuckets`: samples of about the same length in each global batch
    mixture        `Mixture`: several sources, each with its share and with epochs of its own
    fair_turns     gives sources their turns, so that each has its share at any position
    sources        `Sources`: a dict of datasets as one dataset
    sampler        chooses the samples and the seed of each step and slot
    dataset        seeds the samples of a batch, names the sample of an error, identifies and checks a dataset
    epochs         tells a dataset with `set_epoch` the epoch of the samples that are loaded next
    fetching       fetches batches in this process or in worker processes
    weighted       batches with the number of their targets, by a config's `weight`
    loader         `SlotLoader`: yields the microbatches of this rank's slots, from any position
    probes         single samples that are loaded to compare them with those of other ranks
    copy_ahead     copies the next step to an accelerator while the current step computes
    stream         `StreamLoader`: a SlotLoader for data that can only be iterated
    passes         the passes over a stream, and the step at which each of them ends on all ranks
    stream_reader  reads the samples of a stream, in the process that has opened it
    ranks          the collectives that a StreamLoader needs
    token_reader   reads token files by position: several files as one row of tokens
    token_files    `TokenFiles`: the windows of token files, as a dataset
    packed         `PackedTokens`: windows with several documents, and the mask that keeps these apart

| noun       | meaning                                                                                         |
|------------|-------------------------------------------------------------------------------------------------|
| position   | an epoch and a step in it, both from 0: the step that comes next                                |
| order      | the samples of an epoch by position: a function of (run's seed, epoch); an object that gives it |
| Microbatch | the indices of the samples of one slot in one step, with the seed to load them under            |
| StepBatch  | the loaded microbatches of one rank for one step, a list in slot order                          |
| pass       | one reading of the data from its start: an epoch of a stream; its length shows only at its end  |
| Passes     | the object that reads a stream pass after pass, one step ahead                                  |
| stream     | an iterator over samples: of one slot's shard, or of the whole dataset                          |
| Unit       | the slots that are read from one stream: one slot of a sharded dataset, else all slots          |
| Request    | one step of one unit, as a worker receives it                                                   |
| Part       | the result of a request: the batches of a unit's slots, and the state of its stream after them  |
| Fetching   | a DataLoader with its workers: it turns microbatches, or requests, into loaded batches          |
| Copies     | the batches on their way to an accelerator                                                      |

An example: 20 samples, a global batch of 8 in 4 slots, and a run with seed 7. An epoch has 2 steps and leaves out 4
samples. Step 1 of epoch 1 is the positions 8 to 15 of that epoch's order:

    >>> from disttrain.data import IndexShuffle, SlotBatchSampler, SlotLoader
    >>> from disttrain.seeding import seed_for
    >>> order = IndexShuffle(20, key=seed_for(7, "order", 1))
    >>> list(order)
    [16, 9, 8, 3, 11, 6, 13, 12, 19, 2, 18, 4, 1, 15, 17, 7, 5, 0, 14, 10]
    >>> order.indices(8, 16).tolist()
    [19, 2, 18, 4, 1, 15, 17, 7]

Of 2 ranks, rank 0 owns the slots 0 and 1, and rank 1 owns the slots 2 and 3. Each slot gets 2 of these samples:

    >>> for rank, slots in enumerate([range(0, 2), range(2, 4)]):
    ...     sampler = SlotBatchSampler(20, 8, 4, seed=7, slots=slots)
    ...     sampler.seek(epoch=1, step=1)
    ...     print(f"rank {rank}:", {f"slot {batch.slot}": list(batch) for batch in sampler})
    rank 0: {'slot 0': [19, 2], 'slot 1': [18, 4]}
    rank 1: {'slot 2': [1, 15], 'slot 3': [17, 7]}

Each microbatch is loaded under a seed made from (run's seed, epoch, step, slot), so the augmentation of a sample is the
same on any rank and in any worker. The loader of rank 1 yields this step, and is then at the start of epoch 2:

    >>> loader = SlotLoader(range(100, 120), SlotBatchSampler(20, 8, 4, seed=7, slots=range(2, 4)), collate_fn=list)
    >>> loader.seek(epoch=1, step=1)
    >>> next(iter(loader)), (loader.epoch, loader.step)
    ([[101, 115], [117, 107]], (2, 0))

*Contract*: everything is a function of the run's seed and a position. No module here has a backend: a loader gets the
slots that are its own, and an evaluation gets the number of its rank.
"""

from disttrain.data.copy_ahead import Copies, copies_for
from disttrain.data.dataset import (
    LoadingError,
    SeededDataset,
    check_dataset,
    check_stream,
    fingerprint,
    is_iterable_style,
)
from disttrain.data.length_buckets import LengthBuckets
from disttrain.data.loader import (
    Seekable,
    SlotLoader,
    StepBatch,
    evaluation_loader,
    evaluation_probes,
    update_dataloader,
)
from disttrain.data.mixture import Mixture
from disttrain.data.order import Order, Sequential, Shuffled
from disttrain.data.packed import IGNORED, PackedTokens, document_mask, num_targets
from disttrain.data.permutation import IndexShuffle
from disttrain.data.probes import Probe, probed_indices
from disttrain.data.sampler import (
    EvaluationBatch,
    EvaluationBatchSampler,
    Microbatch,
    ReproducibleBatchSampler,
    SeededBatch,
    SlotBatchSampler,
)
from disttrain.data.sources import Sources
from disttrain.data.stream import StreamLoader
from disttrain.data.token_files import TokenFiles
from disttrain.data.weighted_order import Weighted

__all__ = [
    "IGNORED",
    "Copies",
    "EvaluationBatch",
    "EvaluationBatchSampler",
    "IndexShuffle",
    "LengthBuckets",
    "LoadingError",
    "Microbatch",
    "Mixture",
    "Order",
    "PackedTokens",
    "Probe",
    "ReproducibleBatchSampler",
    "SeededBatch",
    "SeededDataset",
    "Seekable",
    "Sequential",
    "Shuffled",
    "SlotBatchSampler",
    "SlotLoader",
    "Sources",
    "StepBatch",
    "StreamLoader",
    "TokenFiles",
    "Weighted",
    "check_dataset",
    "check_stream",
    "copies_for",
    "document_mask",
    "evaluation_loader",
    "evaluation_probes",
    "fingerprint",
    "is_iterable_style",
    "num_targets",
    "probed_indices",
    "update_dataloader",
]
