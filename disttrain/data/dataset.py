"""A dataset as the run sees it: seeded per microbatch, its errors named, its identity checked.

*Contract*: what a sample looks like depends on its index and on the seed of the microbatch it is loaded in, never
on the process that loads it or on what was loaded before, as long as the dataset draws from the global
generators of python, numpy and torch. A generator that the dataset keeps for itself has a history, which no
framework can see.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from disttrain.data.sampler import SeededBatch
from disttrain.errors import DataError
from disttrain.seeding import seed_for, seed_position

LONGEST_QUOTE = 300
NUM_HASHED_ROWS = 16


class LoadingError(DataError):
    """A sample or a batch that could not be made; one line, in worker processes too.

    A DataLoader sends an error of a worker home as its class and a text: "Caught ... Original Traceback ...".
    The message here is the last line of that text, which is ours; the whole of it becomes a note, which a printed
    traceback shows.
    """

    def __init__(self, message: str) -> None:
        in_worker = message.startswith("Caught ")
        line = message.rstrip().rpartition("\n")[2].partition(": ")[2] if in_worker else message
        super().__init__(line)
        if in_worker:
            self.add_note(message)


def quoted(error: Exception) -> str:
    """Return an error as one line of a message: its type, and what it says, cut where it is long."""
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _named(batch: SeededBatch) -> str:
    return f"{batch.name} (dataset indices {', '.join(map(str, batch[:8]))}{', ...' if len(batch) > 8 else ''})"


class SeededDataset(Dataset[Any]):
    """A dataset whose batches are loaded under their own seed, whichever process loads them.

    *Contract*: the seed stays in force when `__getitems__` returns, so that a collate function's draws are
    seeded too. Whoever loads in a process whose randomness matters otherwise keeps it (`random_state_kept`).
    *Errors*: LoadingError: `dataset[17] raised ValueError: ...`.
    *Cost*: about 15 microseconds a batch above the dataset's own work.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return one sample as the dataset gives it, unseeded: an index alone has no position in a run."""
        return self.dataset[index]

    def __getitems__(self, batch: SeededBatch) -> Any:
        """Return the samples of `batch`, drawn under its seed."""
        if not isinstance(batch, SeededBatch):
            raise TypeError(
                f"a SeededDataset loads batches that carry a seed, got a {type(batch).__name__}; "
                "give the DataLoader a SlotBatchSampler or an EvaluationBatchSampler as its batch_sampler"
            )
        seed_position(batch.seed)
        # Asked for as torch's own loaders ask: None there means that there is none.
        getitems = getattr(self.dataset, "__getitems__", None)
        if not getitems:
            return [self._sample(index, batch) for index in batch]
        try:
            return getitems(list(batch))
        except Exception as error:
            self._find_culprit(batch)
            raise LoadingError(f"dataset.__getitems__ raised {quoted(error)}, loading {_named(batch)}") from error

    def _sample(self, index: int, batch: SeededBatch) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            raise LoadingError(
                f"dataset[{index}] raised {quoted(error)}; mend that sample or leave it out (it is in {batch.name})"
            ) from error

    def _find_culprit(self, batch: SeededBatch) -> None:
        """Raise the error of the first sample that cannot be loaded alone, to name it, if there is one."""
        if not hasattr(self.dataset, "__getitem__"):
            return
        for index in batch:
            try:
                self._sample(index, batch)
            except LoadingError as error:
                if isinstance(error.__cause__, NotImplementedError):  # torch's Dataset: this one loads batches only
                    return
                raise


class CollatedDataset(SeededDataset):
    """A SeededDataset whose batches come collated, so that a failing collate function's batch can be named.

    Its DataLoader's own collate function must hand the batch through.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any] | None = None) -> None:
        super().__init__(dataset)
        self.collate_fn = default_collate if collate_fn is None else collate_fn

    def __getitems__(self, batch: SeededBatch) -> Any:
        """Return the batch that the samples of `batch` make."""
        return collated(self.collate_fn, super().__getitems__(batch), _named(batch))


def collated(collate_fn: Callable[[Any], Any], samples: Any, name: str) -> Any:
    """Return the batch that `samples` make; LoadingError, with the batch's `name`, where they make none."""
    try:
        return collate_fn(samples)
    except Exception as error:
        function = getattr(collate_fn, "__name__", type(collate_fn).__name__)
        raise LoadingError(
            f"{function} raised {quoted(error)}, collating {name}; give all samples one shape and type, "
            "or a collate function that takes them as they are"
        ) from error


def is_iterable_style(dataset: Any) -> bool:
    """Return whether `dataset` can only be read from its start: an IterableDataset, or iterable but not indexable."""
    if isinstance(dataset, IterableDataset):
        return True
    return hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")


def check_dataset(dataset: Any, field: str = "dataset") -> dict[str, Any]:
    """Return what identifies a dataset: its `dataset_length` and `dataset_fingerprint`.

    *Errors*: DataError unless it has a length, above 0, and can be indexed; `field` names it in the message. No
    sample is loaded: that may open files which worker processes, forked later, must not share.
    """
    expected = f"{field}: expected a dataset with __len__ and __getitem__, got {type(dataset).__name__}"
    if is_iterable_style(dataset):
        raise DataError(
            f"{expected}, which can only be iterated; put its samples into a list or an indexed file "
            "(training data may be iterated: docs/streams.md)"
        )
    if not (hasattr(dataset, "__getitem__") or hasattr(dataset, "__getitems__")):
        raise DataError(f"{expected}, which cannot be indexed; give it a __getitem__(self, index)")
    try:
        num_samples = len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise DataError(f"{expected}, whose length is unknown ({quoted(error)}); give it a __len__(self)") from error
    if num_samples < 1:
        raise DataError(_empty(dataset, field))
    return {"dataset_length": num_samples, "dataset_fingerprint": fingerprint(dataset)}


def check_stream(dataset: Any, field: str = "dataset") -> dict[str, Any]:
    """Return what identifies an iterable-style dataset, as `check_dataset` does; a length that is unknown is None.

    *Errors*: DataError for one that can be iterated only once, gives batches, or says that it is empty.
    """
    if isinstance(dataset, DataLoader):
        raise DataError(
            f"{field}: expected a dataset, which gives samples, got a DataLoader, which gives batches; return its "
            "dataset: batches, order and workers are made here"
        )
    once = isinstance(dataset, Iterator) and not hasattr(dataset, "load_state_dict")
    if once or not callable(getattr(dataset, "__iter__", None)):
        raise DataError(
            f"{field}: expected an object whose iter() begins anew each time, got a {type(dataset).__name__}, which "
            "can be read only once; return an IterableDataset, whose __iter__ may be the function that makes it"
        )
    num_samples = length_of(dataset)
    if num_samples is not None and num_samples < 1:
        raise DataError(_empty(dataset, field))
    return {"dataset_length": num_samples, "dataset_fingerprint": fingerprint(dataset)}


def length_of(dataset: Any) -> int | None:
    """Return `len(dataset)`, None where that is unknown."""
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _empty(dataset: Any, field: str) -> str:
    return (
        f"{field}: expected at least one sample, got an empty {type(dataset).__name__}; "
        "check that its files were found and that no filter took every sample"
    )


def fingerprint(dataset: Any) -> str:
    """Return 16 hex digits that tell one dataset from another: its type, its length and what is cheap to see.

    Seen are an attribute or method `fingerprint` of the dataset's own (or `_fingerprint`, as Hugging Face's have
    it), the parts of torch's Subset and ConcatDataset, and of a TensorDataset the shapes, dtypes and a few rows.
    Other datasets are not asked for samples: reading one may be slow, random, or open a file before the worker
    processes fork. So equal fingerprints do not prove equal data; give the dataset a `fingerprint` for that.
    """
    text = "\n".join(_features(dataset))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _features(dataset: Any) -> Iterator[str]:
    # Without the module's name: that of a cfg.py depends on where it was loaded from.
    yield f"{type(dataset).__qualname__} of {length_of(dataset)}"
    for name in ("fingerprint", "_fingerprint"):
        if (own := getattr(dataset, name, None)) is not None:
            yield str(own() if callable(own) else own)
            return
    if isinstance(dataset, Subset):
        yield hashlib.blake2b(np.asarray(dataset.indices, dtype=np.int64).tobytes()).hexdigest()
        yield from _features(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _features(part)
    elif isinstance(dataset, TensorDataset):
        for tensor in dataset.tensors:
            yield f"{tensor.dtype} {tuple(tensor.shape)}"
            rows = [seed_for(0, "fingerprint", i) % len(tensor) for i in range(NUM_HASHED_ROWS if len(tensor) else 0)]
            some = tensor[rows].detach().cpu().contiguous()
            yield hashlib.blake2b(some.view(torch.uint8).numpy().tobytes()).hexdigest()
