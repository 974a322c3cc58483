"""WHAT goes into a step: the order of the samples, which slot loads which, and loading them anywhere alike.

`permutation` (a random order without holding it), `sampler` (step, slot and rank to indices and a seed),
`dataset` (seeding, naming errors, telling datasets apart), `fetching` (worker processes), `loader` (positions);
`stream` and `stream_reader`: the same for data that can only be iterated.

*Contract*: everything is a function of the run's seed and a position. Ranks are unknown here: a loader is told
which slots are its own, an evaluation which part of the batches.
"""

from disttrain.data.ahead import Copies, copies_for
from disttrain.data.dataset import (
    LoadingError,
    SeededDataset,
    check_dataset,
    check_stream,
    fingerprint,
    is_iterable_style,
)
from disttrain.data.loader import Seekable, SlotLoader, StepBatch, evaluation_loader, update_dataloader
from disttrain.data.permutation import IndexShuffle
from disttrain.data.sampler import (
    EvaluationBatch,
    EvaluationBatchSampler,
    Microbatch,
    ReproducibleBatchSampler,
    SeededBatch,
    SlotBatchSampler,
)
from disttrain.data.stream import StreamLoader

__all__ = [
    "Copies",
    "EvaluationBatch",
    "EvaluationBatchSampler",
    "IndexShuffle",
    "LoadingError",
    "Microbatch",
    "ReproducibleBatchSampler",
    "SeededBatch",
    "SeededDataset",
    "Seekable",
    "SlotBatchSampler",
    "SlotLoader",
    "StepBatch",
    "StreamLoader",
    "check_dataset",
    "check_stream",
    "copies_for",
    "evaluation_loader",
    "fingerprint",
    "is_iterable_style",
    "update_dataloader",
]
