"""Reading a stream: the samples of each slot's microbatches, in order, in whatever process reads that slot.

*Contract*: what is read for a slot in a step of a pass depends on those three alone. The generators of python, numpy
and torch are seeded before a stream is opened, and before the samples of each microbatch are drawn, by whoever
draws them: also those that this rank throws away.

*Errors*: whatever a stream or a collate function raises comes as a `LoadingError` of one line.

*Cost*: a stream with `state_dict` is asked for its state after every microbatch, which is copied and, from a worker,
sent along: keep it small (positions and counts, not buffers).
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

from disttrain.data.dataset import LoadingError, collated, quoted
from disttrain.seeding import seed_for, seed_position

State = dict[str, Any]
"""What `state_dict` of a stream ("stream") and of its iterator ("iterator") said: of those of the two that have it."""


class Unit(NamedTuple):
    """Slots that one stream holds, read in this order, and those of them whose batches are wanted."""

    slots: range
    kept: range


class Request(NamedTuple):
    """A step of one unit; what is not `kept` is read and thrown away."""

    unit: int
    step: int
    kept: bool


class Requests:
    """The endless requests of a pass, as the iterable that a DataLoader wants (it begins one twice).

    `per_step` is the number of units, or more, filled with None; the first `num_dropped` steps are not kept.
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
    """What a unit gives for a step: a batch for each of its kept slots, and the state behind them."""

    batches: list[Any] | None
    """None: the stream has ended before all slots had their samples."""
    state: State | None = None
    """None: the stream has none."""
    num_left: int = 0
    """Samples that were left when the stream ended."""


class StreamReader:
    """The streams of the slots `mine`, of `num_slots`, opened when they are first read, in the process that reads them.

    A dataset with `shard(num_shards, index)` is one unit a slot; any other is one unit, of which `mine` are kept.
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
        one_each = [Unit(range(slot, slot + 1), range(slot, slot + 1)) for slot in mine]
        self.units = one_each if self.sharded else [Unit(range(num_slots), mine)]
        self.microbatch_size = microbatch_size
        self.num_slots = num_slots
        self.seed = seed
        self.collate_fn = default_collate if collate_fn is None else collate_fn
        self.begin(0, {})

    def begin(self, epoch: int, states: Mapping[int, State]) -> None:
        """Let each stream be opened anew in pass `epoch`: at its start, or at the state of its unit's first slot."""
        self._epoch = epoch
        self._states = states
        self._open: dict[int, _Open] = {}

    def __getitems__(self, request: Request | None) -> Part | None:
        """Return what a request asks for; nothing for None."""
        if request is None:
            return None
        unit = self.units[request.unit]
        stream = self._open.get(request.unit)
        if stream is None:
            with _worker_hidden():
                stream = self._opened(request.unit)
        batches, num_samples = [], 0
        for slot in unit.slots:
            name = f"the microbatch of epoch={self._epoch}, step={request.step}, slot={slot}"
            seed_position(seed_for(self.seed, "batch", self._epoch, request.step, slot))
            with _worker_hidden():
                samples = stream.draw(self.microbatch_size, name)
            num_samples += len(samples)
            if len(samples) < self.microbatch_size:
                return Part(None, num_left=num_samples)
            if request.kept and slot in unit.kept:
                batches.append(collated(self.collate_fn, samples, name))
        return Part(batches, stream.state() if request.kept else None)

    def _opened(self, number: int) -> "_Open":
        """Open a unit's stream for this pass, under a seed of its own."""
        first = self.units[number].slots.start
        seed_position(seed_for(self.seed, "stream", self._epoch, first))
        call = f"train_data.shard({self.num_slots}, {first})" if self.sharded else "train_data"
        try:
            _set_epoch(self.dataset, self._epoch)
            if self.sharded:
                stream = self.dataset.shard(self.num_slots, first)
                _set_epoch(stream, self._epoch)
            else:
                # Where an object remembers how far it was read, the next pass must not begin there.
                stream = copy.copy(self.dataset) if _is_stateful(self.dataset) else self.dataset
            self._open[number] = _Open(stream, self._states.get(first))
        except LoadingError:
            raise
        except Exception as error:
            advice = "; it is called for each of the num_slots: use as many as it can make" if self.sharded else ""
            raise LoadingError(f"{call} raised {quoted(error)}, when pass {self._epoch} was begun{advice}") from error
        return self._open[number]

    def too_short(self, epoch: int, left: Mapping[int, int]) -> str:
        """Say which streams ended before the first step of a pass; `left` is the samples that they had, by slot."""
        if self.sharded:
            slot, num_samples = min(left.items())
            expected = f"at least {self.microbatch_size} samples (a slot's part of a step) in each shard"
            found = f"{num_samples} in shard {slot} of {self.num_slots}"
            found += f" and too few in {len(left) - 1} more" if len(left) > 1 else ""
            todo = "cut the data into even shards, or use fewer slots or a smaller global_batch_size"
        else:
            expected = f"at least {self.microbatch_size * self.num_slots} samples (one step)"
            found = f"{max(left.values())}"
            todo = "use more data or a smaller global_batch_size"
        if epoch:
            todo = "each iter() of it has to begin anew"
        elif not any(left.values()):
            todo = "check that its files were found and that no filter took every sample"
        return f"pass {epoch} of the training data has not one step: expected {expected}, got {found}; {todo}"


class _Open:
    """A stream being read, from its start or from a state."""

    def __init__(self, stream: Any, state: State | None) -> None:
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
        """Return the next samples: `count` of them, or what was left."""
        samples: list[Any] = []
        while len(samples) < count and not self._ended:
            try:
                samples.append(next(self._iterator))
            except StopIteration:
                self._ended = True  # and is not asked again: some would begin anew
            except Exception as error:
                raise LoadingError(
                    f"the stream raised {quoted(error)}, making sample {len(samples)} of {name}; "
                    "mend that sample or leave it out"
                ) from error
        return samples

    def state(self) -> State | None:
        """Return a copy of the state behind what was drawn, which stays as it is while the stream is read on."""
        return {what: _plain(it.state_dict(), f"the {what}'s state") for what, it in self._stateful.items()} or None


@contextmanager
def _worker_hidden() -> Iterator[None]:
    """Let torch's get_worker_info() say None.

    Each stream is read by one process alone. One that shards itself by it, as those of Hugging Face do, would take a
    part of its part, and another with another number of workers.
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
        raise LoadingError(
            f"the checkpoint holds the state of a stream, and {type(stream).__name__} has no load_state_dict(state) "
            "to take it; give it back, or start anew with --fresh"
        )
    # A copy: a stream may go on in the very objects that it is given.
    stream.load_state_dict(copy.deepcopy(state))


def _plain(value: Any, path: str) -> Any:
    """Return a copy of a state; LoadingError, at the first batch, for what no checkpoint can hold."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if kind in (list, tuple):
        return kind(_plain(item, f"{path}[{index}]") for index, item in enumerate(value))
    if kind in (dict, OrderedDict, Counter) and all(type(key) in (str, int) for key in value):
        return kind({key: _plain(item, f"{path}[{key!r}]") for key, item in value.items()})
    raise LoadingError(
        f"{path} is of type {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; expected None, "
        "bool, int, float, str, list, tuple, dict with str or int keys, or a tensor: convert it in state_dict()"
    )
