"""Wraps a dataset for a run: seeds each microbatch, names the sample of an error, identifies and checks the dataset.

*Contract*: a sample depends only on its index and on the seed of its microbatch. It does not depend on the process
that loads it, or on the samples loaded before. This holds if the dataset draws from the global generators of Python,
numpy and torch. A generator that the dataset keeps for itself has a history, which no framework can see.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from disttrain.data.epochs import EpochTeller
from disttrain.data.probes import Probe
from disttrain.data.sampler import SeededBatch
from disttrain.errors import DataError
from disttrain.mistakes import is_mistake, placed, quoted
from disttrain.seeding import SeededConfig, seed_for, seed_position

NUM_HASHED_ROWS = 16
LONGEST_HASHED = 2**20


class LoadingError(DataError):
    """A sample or a batch could not be made, and perhaps can be after a restart. The message is one line, always.

    A DataLoader sends an error of a worker to the main process as its class and a text: "Caught ... Original
    Traceback ...". The last line of that text is our message. The whole text becomes a note, which a printed traceback
    shows.
    """

    exit_code = 1

    def __init__(self, message: str) -> None:
        in_worker = message.startswith("Caught ")
        line = message.rstrip().rpartition("\n")[2].partition(": ")[2] if in_worker else message
        super().__init__(line)
        if in_worker:
            self.add_note(message)


class SampleError(LoadingError):
    """A mistake in the code of the data: the same sample or batch fails again after every restart."""

    exit_code = 2


def loading_error(message: str, cause: BaseException) -> LoadingError:
    """Return the error of a sample or a batch for which the user's code raised `cause`."""
    return (SampleError if is_mistake(cause) else LoadingError)(message)


def _batch_name(batch: SeededBatch) -> str:
    return f"{batch.name} (dataset indices {', '.join(map(str, batch[:8]))}{', ...' if len(batch) > 8 else ''})"


class SeededDataset(Dataset[Any]):
    """A dataset that loads each batch under the batch's own seed, in any process.

    *Contract*: the seed stays set when `__getitems__` returns, so the draws of a collate function are seeded too. A
    caller that needs the earlier state of the global generators keeps it (`random_state_kept`). A dataset with a
    `set_epoch` is told the epoch of each batch (data/epochs.py).
    *Errors*: LoadingError: `dataset[17] raised ValueError: ...`.
    *Cost*: about 15 microseconds for each batch, in addition to the dataset's own work.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._teller = EpochTeller(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return one sample of the dataset, unseeded, because an index alone is no position in a run."""
        return self.dataset[index]

    def __getitems__(self, batch: SeededBatch) -> Any:
        """Return the samples of `batch`, drawn under its seed."""
        if not isinstance(batch, SeededBatch):
            raise TypeError(
                f"a SeededDataset loads batches that carry a seed, got a {type(batch).__name__}; "
                "give the DataLoader a SlotBatchSampler or an EvaluationBatchSampler as its batch_sampler"
            )
        try:
            self._teller.tell(batch.epoch, batch.run_seed)
        except Exception as error:
            raise loading_error(f"dataset.set_epoch({batch.epoch}) raised {placed(error)}", error) from error
        seed_position(batch.seed)
        # As torch's own loaders do it: the attribute may be there and be None.
        getitems = getattr(self.dataset, "__getitems__", None)
        if not getitems:
            return [self._sample(index, batch) for index in batch]
        try:
            return getitems(list(batch))
        except Exception as error:
            self._raise_for_bad_sample(batch)
            raised = f"dataset.__getitems__ raised {placed(error)}, loading {_batch_name(batch)}"
            raise loading_error(raised, error) from error

    def _sample(self, index: int, batch: SeededBatch) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            raised = f"dataset[{index}] raised {placed(error)}"
            advice = f"repair that sample or leave it out (it is in {batch.name})"
            raise loading_error(f"{raised}; {advice}", error) from error

    def _raise_for_bad_sample(self, batch: SeededBatch) -> None:
        """Load the samples one by one, and raise a LoadingError that names the first bad one, if there is one."""
        if not hasattr(self.dataset, "__getitem__"):
            return
        for index in batch:
            try:
                self._sample(index, batch)
            except LoadingError as error:
                if isinstance(error.__cause__, NotImplementedError):  # torch's Dataset: it loads only whole batches
                    return
                raise


class CollatedDataset(SeededDataset):
    """A SeededDataset that collates its batches itself, so that an error of the collate function names the batch.

    The collate function of its DataLoader must return the batch unchanged.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any] | None = None) -> None:
        super().__init__(dataset)
        self.collate_fn = default_collate if collate_fn is None else collate_fn

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker that is not forked, which runs the cfg.py again to unpickle the dataset."""
        return {"config": SeededConfig(), **vars(self)}

    def __getitems__(self, batch: SeededBatch) -> Any:
        """Return the samples of `batch`, collated; of a `Probe` the digest of its sample."""
        if isinstance(batch, Probe):
            try:
                return batch.digest(super().__getitems__(batch))
            except Exception as error:  # noqa: BLE001 - the step that needs the sample raises it
                return f"raised {type(error.__cause__ or error).__name__}"
        return collated(self.collate_fn, super().__getitems__(batch), _batch_name(batch))


def collated(collate_fn: Callable[[Any], Any], samples: Any, name: str) -> Any:
    """Return the collated `samples`; raise LoadingError with the batch's `name` if that fails."""
    try:
        return collate_fn(samples)
    except Exception as error:
        function = getattr(collate_fn, "__name__", type(collate_fn).__name__)
        raised = f"{function} raised {placed(error)}, collating {name}"
        advice = "give all samples one shape and type, or set a collate function that accepts them as they are"
        raise loading_error(f"{raised}; {advice}", error) from error


def is_iterable_style(dataset: Any) -> bool:
    """Return whether `dataset` can only be iterated: an IterableDataset, or an object with no `__getitem__`."""
    if isinstance(dataset, IterableDataset):
        return True
    return hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")


def check_dataset(dataset: Any, field: str = "dataset") -> dict[str, Any]:
    """Return the identity of a dataset: its `dataset_length` and `dataset_fingerprint`.

    *Errors*: DataError unless it can be indexed and has a length above 0. `field` is its name in the message. No sample
    is loaded, because that may open files that must not be shared with worker processes, which are forked later.
    """
    expected = f"{field}: expected a dataset with __len__ and __getitem__, got {type(dataset).__name__}"
    if is_iterable_style(dataset):
        raise DataError(
            f"{expected}, which can only be iterated; put its samples into a list or an indexed file "
            "(only training data may be iterated: docs/streams.md)"
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
    """Return the identity of an iterable-style dataset, as `check_dataset` does; an unknown length is None.

    *Errors*: DataError for a dataset that can be iterated only once, that yields batches, or whose length is 0.
    """
    if isinstance(dataset, DataLoader):
        raise DataError(
            f"{field}: expected a dataset, which gives samples, got a DataLoader, which gives batches; return its "
            "dataset, since disttrain makes batches, order and workers itself"
        )
    readable_once = isinstance(dataset, Iterator) and not hasattr(dataset, "load_state_dict")
    if readable_once or not callable(getattr(dataset, "__iter__", None)):
        raise DataError(
            f"{field}: expected an object whose iter() begins anew each time, got a {type(dataset).__name__}, which "
            "can be read only once; return an IterableDataset whose __iter__ creates it"
        )
    num_samples = length_of(dataset)
    if num_samples is not None and num_samples < 1:
        raise DataError(_empty(dataset, field))
    return {"dataset_length": num_samples, "dataset_fingerprint": fingerprint(dataset)}


def length_of(dataset: Any) -> int | None:
    """Return `len(dataset)`, or None if that is unknown."""
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _empty(dataset: Any, field: str) -> str:
    return (
        f"{field}: expected at least one sample, got an empty {type(dataset).__name__}; "
        "check that its files were found and that no filter removed every sample"
    )


def fingerprint(dataset: Any) -> str:
    """Return 16 hex digits that identify a dataset by its type, its length and features that are cheap to read.

    These features are the dataset's own attribute or method `fingerprint` (or Hugging Face's `_fingerprint`), the parts
    of torch's Subset and ConcatDataset, and the shapes, dtypes and a few rows of a TensorDataset. No sample of any
    other dataset is read: that may be slow or random, or open a file before the worker processes are forked. So equal
    fingerprints do not prove equal data. Give a dataset a `fingerprint` for that.
    """
    text = "\n".join(_features(dataset))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _features(dataset: Any) -> Iterator[str]:
    # Without the name of the module, because that of a cfg.py depends on the place from which it was loaded.
    yield f"{type(dataset).__qualname__} of {length_of(dataset)}"
    for name in ("fingerprint", "_fingerprint"):
        if (own := getattr(dataset, name, None)) is not None:
            yield str(own() if callable(own) else own)
            return
    if isinstance(dataset, Subset):
        yield _digest_of(dataset.indices)
        yield from _features(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _features(part)
    elif isinstance(dataset, TensorDataset):
        for tensor in dataset.tensors:
            yield f"{tensor.dtype} {tuple(tensor.shape)}"
            rows = [seed_for(0, "fingerprint", i) % len(tensor) for i in range(NUM_HASHED_ROWS if len(tensor) else 0)]
            selected = tensor[rows].detach().cpu().contiguous()
            yield hashlib.blake2b(selected.view(torch.uint8).numpy().tobytes()).hexdigest()


def _digest_of(indices: Any) -> str:
    """Return the hash of the indices of a Subset; of a long range, which may be one of 10**11 windows, of its ends."""
    if not isinstance(indices, range):
        return hashlib.blake2b(np.asarray(indices, dtype=np.int64).tobytes()).hexdigest()
    if len(indices) > LONGEST_HASHED:
        return f"range {indices.start} {indices.stop} {indices.step}"
    return hashlib.blake2b(np.arange(indices.start, indices.stop, indices.step, dtype=np.int64).tobytes()).hexdigest()
