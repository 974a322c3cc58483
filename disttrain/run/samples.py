"""Compares a few samples before the first step: twice on each rank, between the ranks, and with the run's own.

A length and a fingerprint do not show a label that was numbered in another order, a file that was edited, or noise from
the system's entropy. The contents of the first, the last and a fixed sample of the training data and of the validation
data do. Each is loaded twice, under a seed of its own, by the processes that load the batches; with several workers
the second time by another one. Of a stream the first samples are compared between the ranks; a resumed stream compares
the samples that come next by itself.

*Contract*: the hashes are part of every checkpoint's position. A checkpoint without them is resumed without the
comparison.

*Errors*: DataError of rank 0, for which every rank stops, that names the sample. Where other bits are expected anyway
(other kernels, `deterministic=false`) a warning takes its place.

*Cost*: ten samples, and one gather.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from disttrain.data import Probe, SlotLoader, evaluation_probes, probed_indices
from disttrain.errors import DataError
from disttrain.evidence import sample_hash
from disttrain.handlers.progress import warn
from disttrain.run.state import Run
from disttrain.run.validation_sets import named_sets

NUM_SAMPLES = {"train_data": 3, "valid_data": 2}
NUM_OF_STREAM = 2
_WHY = (
    "the data depends on something that each process has for itself: files that differ, the order of a set or of a "
    "folder's files, the clock, the system's entropy"
)


@dataclass(frozen=True)
class _Loaded:
    """The data of one rank: its identity, the hashes of samples by name, and the names of those that vary."""

    data: Mapping[str, Any]
    hashes: Mapping[str, str]
    varying: Sequence[str]


def compare_samples(run: Run, saved: Mapping[str, Any], same_kernels: bool, console: Console) -> None:
    """Load the samples and compare them; `saved` is the position of the checkpoint from which the run resumes.

    Call it when the loader stands at its position, and before it is used: it starts the loader's workers.
    """
    with run.backend.agree("loading a few samples"):
        mine = _load(run)
    by_rank: list[_Loaded] = run.backend.all_gather(mine)
    run.samples = dict(mine.hashes)
    if text := _varying(by_rank):
        _refuse(run, text, run.config.deterministic, console)
    varying = {name for loaded in by_rank for name in loaded.varying}
    if text := _differing_ranks(by_rank, varying):
        _refuse(run, text, same_kernels, console)
    if text := None if run.config.accept_other_data else _changed(mine, saved, varying):
        _refuse(run, text, same_kernels, console)


def _refuse(run: Run, text: str, is_refused: bool, console: Console) -> None:
    """Raise on rank 0, and thereby on all ranks; ranks that end at once by errors of their own miss each other's."""
    if not is_refused:
        warn(console, text)
        return
    with run.backend.agree("comparing a few samples"):
        if run.backend.rank == 0:
            raise DataError(text)


def _load(run: Run) -> _Loaded:
    """Load this rank's samples; those of the validation data meanwhile, if workers load them."""
    seed, num_workers = run.config.seed, run.config.num_workers
    sets = named_sets(run.valid_data)
    valid = {name: _probes(dataset, NUM_SAMPLES["valid_data"], seed) for name, dataset in sets.items()}
    waits = {name: evaluation_probes(dataset, valid[name], num_workers) for name, dataset in sets.items()}
    loader = run.loader
    hashes: dict[str, str] = {}
    varying: list[str] = []
    if isinstance(loader, SlotLoader):
        train = _probes(range(loader.sampler.num_samples), NUM_SAMPLES["train_data"], seed)
        _note("train_data", train, loader.load_probes(train), hashes, varying)
    elif run.backend.world_size > 1:
        begins = loader.load_probes(NUM_OF_STREAM, sample_hash)
        hashes.update({f"the stream's sample {number}": each for number, each in enumerate(begins)})
    for name, wait in waits.items():
        _note(name, valid[name], wait(), hashes, varying)
    return _Loaded(run.data, hashes, varying)


def _probes(dataset: Any, count: int, seed: int) -> list[Probe]:
    """Return the probes of a dataset, each twice; of two workers, which take turns, each loads each of them once."""
    once = [Probe(index, seed=seed, digest=sample_hash) for index in probed_indices(len(dataset), count)]
    return [*once, *reversed(once)]


def _note(
    name: str, probes: Sequence[Probe], digests: Sequence[str], hashes: dict[str, str], varying: list[str]
) -> None:
    for (index,), digest in zip(probes, digests, strict=True):
        if hashes.setdefault(f"{name}[{index}]", digest) != digest:
            varying.append(f"{name}[{index}]")


def _varying(by_rank: Sequence[_Loaded]) -> str | None:
    """Return the message for a sample that is another one when it is loaded again."""
    for rank, loaded in enumerate(by_rank):
        if loaded.varying:
            return (
                f"{loaded.varying[0]} is another sample when it is loaded again (rank {rank}), expected the same under "
                "the same seed: it depends on the clock, the system's entropy, the worker, or a generator or counter "
                "of its own; draw from the global generators of random, numpy or torch, which are seeded, or give up "
                "the promise of the same bits by deterministic=false"
            )
    return None


def _differing_ranks(by_rank: Sequence[_Loaded], varying: set[str]) -> str | None:
    """Return the message for ranks that have built different data."""
    first = by_rank[0]
    for rank, loaded in enumerate(by_rank):
        if loaded.data != first.data:
            return (
                f"the ranks have different training data: rank 0 has {dict(first.data)}, rank {rank} has "
                f"{dict(loaded.data)}; {_WHY}"
            )
        for name in [*first.hashes, *loaded.hashes]:
            pair = first.hashes.get(name, "nothing"), loaded.hashes.get(name, "nothing")
            if name not in varying and pair[0] != pair[1]:
                return (
                    f"the ranks have different data: {name} is {pair[0]} on rank 0 and {pair[1]} on rank {rank} "
                    f"(hashes of the contents), expected the same; {_WHY}"
                )
    return None


def _changed(mine: _Loaded, saved: Mapping[str, Any], varying: set[str]) -> str | None:
    """Return the message for other samples than those with which the run began."""
    own = saved.get("samples")
    for name, digest in own.items() if isinstance(own, Mapping) else ():
        if name not in varying and mine.hashes.get(name, digest) != digest:
            return (
                f"the data has changed since the run began: {name} was {digest} and is {mine.hashes[name]} (hashes of "
                "the contents), expected the same; restore it (also the libraries and the kind of machine that compute "
                "it), start anew with --fresh, or go on all the same with accept_other_data=true"
            )
    return None
