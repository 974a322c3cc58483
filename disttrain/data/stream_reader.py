"""Reads streams: the samples of each slot's microbatches, in order, in the process that reads that slot.

*Contract*: the samples of a slot depend only on the pass, the step and the slot. The generators of Python, numpy and
torch are seeded before a stream is opened, and before the samples of each microbatch are drawn, also before those that
this rank drops.

*Errors*: an exception of a stream or of a collate function becomes a `LoadingError` of one line.

*Cost*: the `state_dict` of each stream is called once in each step. Its result is copied and, with workers, sent to
this process. Keep it small: positions and counts, not buffers.
"""

import copy
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import default_collate
from torch.utils.data._utils import worker

from disttrain.data.dataset import LoadingError, SampleError, collated, loading_error
from disttrain.mistakes import placed
from disttrain.seeding import SeededConfig, seed_for, seed_position

StreamState = dict[str, Any]
"""The `state_dict` of a stream ("stream") and of its iterator ("iterator"), if they have one."""


class Unit(NamedTuple):
    """The slots that one stream holds, in the order in which they are read, and the kept ones: this rank's slots."""

    slots: range
    kept: range


class Request(NamedTuple):
    """One step of one unit. If it is not `kept`, its samples are read and dropped."""

    unit: int
    step: int
    kept: bool


class Requests:
    """The endless requests of a pass, as an iterable: a DataLoader makes two iterators of it.

    `per_step` is at least the number of units; requests beyond that are None. The first `num_dropped` steps are not
    kept.
    """

    def __init__(self, num_units: int, per_step: int, first_step: int, num_dropped: int) -> None:
        self._num_units = num_units
        self._per_step = per_step
        self._first_step = first_step
        self._num_dropped = num_dropped

    def __iter__(self) -> Iterator[Request | None]:
        for count, step in enumerate(itertools.count(self._first_step)):
            for unit in range(self._per_step):
                yield Request(unit, step, count >= self._num_dropped) if unit < self._num_units else None


class Part(NamedTuple):
    """The result of a request: a batch for each kept slot of the unit, and the state of its stream after them."""

    batches: list[Any] | None
    """None: the stream ended before all slots had their samples."""
    state: StreamState | None = None
    """None: the stream has no state."""
    num_left: int = 0
    """The number of samples that were left when the stream ended."""


class StreamReader:
    """Reads the streams of the slots `mine`. Each is opened by its first request, in the process that reads it.

    A dataset with `shard(num_shards, index)` has one unit for each slot of `mine`. Any other dataset is one unit of all
    `num_slots` slots, of which `mine` are kept.
    """

    def __init__(
        self,
        dataset: Any,
        microbatch_size: int,
        num_slots: int,
        mine: range,
        seed: int,
        collate_fn: Callable[[list[Any]], Any] | None,
    ) -> None:
        self.dataset = dataset
        self.sharded = callable(getattr(dataset, "shard", None))
        shards = [Unit(range(slot, slot + 1), range(slot, slot + 1)) for slot in mine]
        self.units = shards if self.sharded else [Unit(range(num_slots), mine)]
        self.microbatch_size = microbatch_size
        self.num_slots = num_slots
        self.seed = seed
        self.collate_fn = default_collate if collate_fn is None else collate_fn
        self.begin(0, {})

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a worker that is not forked, which runs the cfg.py again to unpickle the dataset."""
        return {"config": SeededConfig(), **vars(self)}

    def begin(self, epoch: int, states: Mapping[int, StreamState]) -> None:
        """Close all streams. In pass `epoch` they open at their start, or at the state of their unit's first slot."""
        self._epoch = epoch
        self._states = states
        self._streams: dict[int, _OpenStream] = {}

    def __getitems__(self, request: Request | None) -> Part | None:
        """Return the result of a request; None for the request None."""
        if request is None:
            return None
        unit = self.units[request.unit]
        stream = self._streams.get(request.unit)
        if stream is None:
            with _worker_info_hidden():
                stream = self._open(request.unit)
        batches, num_samples = [], 0
        for slot in unit.slots:
            name = f"the microbatch of epoch={self._epoch}, step={request.step}, slot={slot}"
            seed_position(seed_for(self.seed, "batch", self._epoch, request.step, slot))
            with _worker_info_hidden():
                samples = stream.draw(self.microbatch_size, name)
            num_samples += len(samples)
            if len(samples) < self.microbatch_size:
                return Part(None, num_left=num_samples)
            if request.kept and slot in unit.kept:
                batches.append(collated(self.collate_fn, samples, name))
        return Part(batches, stream.state() if request.kept else None)

    def _open(self, number: int) -> "_OpenStream":
        """Open the stream of unit `number` for this pass, under a seed of its own."""
        first = self.units[number].slots.start
        seed_position(seed_for(self.seed, "stream", self._epoch, first))
        call = f"train_data.shard({self.num_slots}, {first})" if self.sharded else "train_data"
        try:
            _set_epoch(self.dataset, self._epoch)
            if self.sharded:
                stream = self.dataset.shard(self.num_slots, first)
                _set_epoch(stream, self._epoch)
            else:
                # A copy, because a stateful object keeps its position, and the next pass must not begin there.
                stream = copy.copy(self.dataset) if _is_stateful(self.dataset) else self.dataset
            self._streams[number] = _OpenStream(stream, self._states.get(first))
        except LoadingError:
            raise
        except Exception as error:
            advice = "; it is called for each slot: use at most as many num_slots as shards" if self.sharded else ""
            raised = f"{call} raised {placed(error)}, when pass {self._epoch} began{advice}"
            raise loading_error(raised, error) from error
        return self._streams[number]

    def too_short_message(self, epoch: int, left: Mapping[int, int]) -> str:
        """Return the message for a pass without a step; `left` is the number of samples of each stream, by slot."""
        if self.sharded:
            slot, num_samples = min(left.items())
            expected = f"at least {self.microbatch_size} samples (a slot's part of a step) in each shard"
            actual = f"{num_samples} in shard {slot} of {self.num_slots}"
            actual += f" and too few in {len(left) - 1} more" if len(left) > 1 else ""
            advice = "cut the data into even shards, or use fewer slots or a smaller global_batch_size"
        else:
            expected = f"at least {self.microbatch_size * self.num_slots} samples (one step)"
            actual = f"{max(left.values())}"
            advice = "use more data or a smaller global_batch_size"
        if epoch:
            advice = "each iter() of it must begin anew"
        elif not any(left.values()):
            advice = "check that its files were found and that no filter removed every sample"
        return f"pass {epoch} of the training data has no step: expected {expected}, got {actual}; {advice}"


class _OpenStream:
    """A stream with its iterator, opened at its start or at a state."""

    def __init__(self, stream: Any, state: StreamState | None) -> None:
        iterator: Iterator[Any] | None = None
        state = state or {}
        if "stream" in state:
            _restore(stream, state["stream"])
        iterator = iter(stream)
        if "iterator" in state:
            _restore(iterator, state["iterator"])
        self._stateful = {"stream": stream} if _is_stateful(stream) else {}
        if iterator is not stream and _is_stateful(iterator):
            self._stateful["iterator"] = iterator
        self._iterator = iterator
        self._ended = False

    def draw(self, count: int, name: str) -> list[Any]:
        """Return the next `count` samples, or fewer if the stream ends."""
        samples: list[Any] = []
        while len(samples) < count and not self._ended:
            try:
                samples.append(next(self._iterator))
            except StopIteration:
                self._ended = True  # `next` is not called again: some iterators would begin anew
            except Exception as error:
                raised = f"the stream raised {placed(error)}, making sample {len(samples)} of {name}"
                raise loading_error(f"{raised}; repair that sample or leave it out", error) from error
        return samples

    def state(self) -> StreamState | None:
        """Return a copy of the state after the drawn samples; further reading of the stream does not change it."""
        return {name: _plain(it.state_dict(), f"the {name}'s state") for name, it in self._stateful.items()} or None


@contextmanager
def _worker_info_hidden() -> Iterator[None]:
    """Make torch's get_worker_info() return None.

    Each stream is read by one process. A stream that shards itself by the worker, as Hugging Face's do, would read only
    a part of its part, and the part would depend on the number of workers.
    """
    info, worker._worker_info = worker._worker_info, None
    try:
        yield
    finally:
        worker._worker_info = info


def _is_stateful(stream: Any) -> bool:
    return callable(getattr(stream, "state_dict", None)) and callable(getattr(stream, "load_state_dict", None))


def _set_epoch(stream: Any, epoch: int) -> None:
    if callable(set_epoch := getattr(stream, "set_epoch", None)):
        set_epoch(epoch)


def _restore(stream: Any, state: Any) -> None:
    if not _is_stateful(stream):
        raise SampleError(
            f"the checkpoint holds the state of a stream, and {type(stream).__name__} has no load_state_dict(state) "
            "to load it; restore that method, or start a new run with --fresh"
        )
    # A copy, because a stream may change the objects of its state while it is read.
    stream.load_state_dict(copy.deepcopy(state))


def _plain(value: Any, path: str) -> Any:
    """Return a copy of a state; raise LoadingError if it holds something that a checkpoint cannot hold."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if kind in (list, tuple):
        return kind(_plain(item, f"{path}[{index}]") for index, item in enumerate(value))
    if kind in (dict, OrderedDict, Counter) and all(type(key) in (str, int) for key in value):
        return kind({key: _plain(item, f"{path}[{key!r}]") for key, item in value.items()})
    raise SampleError(
        f"{path} is of type {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; expected None, "
        "bool, int, float, str, list, tuple, dict with str or int keys, or a tensor: convert it in state_dict()"
    )
