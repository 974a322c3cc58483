"""The model over the whole validation data: every sample exactly once, on any number of ranks.

*Contract*: batches are the same whatever the world size and each rank takes whole ones, so every sample is
seen once on exactly one rank and a metric is that of the data set. Batch losses are folded in batch order in
float64; metric states are merged in rank order. The training generators are left as they were found.

*Cost* of being able to stop: the ranks wait for each other about twice a second, and once more at the end.
"""

import functools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from disttrain.backend import Backend
from disttrain.engine.parts import to_device
from disttrain.errors import DataError
from disttrain.precision import Precision
from disttrain.seeding import keep_random_state

if TYPE_CHECKING:
    from torchmetrics import Metric

Compute = Callable[[nn.Module, Any], tuple[Tensor, Any]]
"""(model, batch) -> (mean loss of the batch, outputs); the metrics are updated with the outputs."""


def num_samples(batch: Any) -> int:
    """Return the number of samples of a batch: the length of the first tensor in it that has one."""
    for tensor in _tensors(batch):
        if tensor.ndim > 0:
            return len(tensor)
    raise DataError(f"expected a tensor in each validation batch, got {type(batch).__name__}; see the field collate")


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


class Evaluation:
    """Evaluates `model` over what `batches()` returns: (batch number, batch) of this rank, perhaps none.

    `gathered()` is the context in which each rank may call the model as often as it likes.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[], Iterable[tuple[int, Any]]],
        compute: Compute,
        metrics: Mapping[str, "Metric"],
        *,
        precision: Precision,
        backend: Backend,
        gathered: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model = model
        self.batches = batches
        self.compute = compute
        self.metrics = dict(metrics)
        self.precision = precision
        self.backend = backend
        self.gathered = gathered
        for metric in self.metrics.values():
            self._give_backend(metric)

    def _give_backend(self, metric: "Metric") -> None:
        """Let the metric gather through the run's backend; torchmetrics would ask torch.distributed by itself."""
        from torchmetrics import Metric  # slow to import, and here already: the metric is one

        for part in metric.modules():
            if isinstance(part, Metric):
                part.dist_sync_fn = functools.partial(self._by_rank, part)
                part.distributed_available_fn = lambda: self.backend.world_size > 1

    @keep_random_state
    def run(self, stop: Callable[[], bool] | None = None) -> dict[str, Any] | None:
        """Return the validation loss and the metrics, the same on every rank.

        None, on every rank, where `stop()` said before a batch of some rank that it is to end at once.
        """
        # One by one: a part of the model may be held in evaluation mode, as a frozen batch norm is.
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        for metric in self.metrics.values():
            metric.reset()
        try:
            with torch.no_grad(), self.gathered():
                losses = self._losses(None if stop is None else Together(self.backend, stop))
        finally:
            for module in training:
                module.training = True
        if losses is None:
            return None
        return {"loss": self._mean(losses), **{name: self._value(metric) for name, metric in self.metrics.items()}}

    def _losses(self, together: "Together | None") -> dict[int, tuple[float, int]] | None:
        """Return the losses of this rank's batches by number, None where the ranks stop before their end."""
        losses, batches, done = {}, iter(self.batches()), False
        while not done:
            if together is not None and together.stop():
                return None  # the iterator ends with this frame, and its workers with it
            numbered = next(batches, None)
            if numbered is None:
                done = True
            else:
                losses[numbered[0]] = self._evaluate(numbered[1])
        return None if together is not None and together.stop_before_all_are_done() else losses

    def _evaluate(self, batch: Any) -> tuple[float, int]:
        with self.precision.forward():
            loss, outputs = self.compute(self.model, batch)
        self.backend.flush()
        outputs = to_device(outputs, self.backend.metrics_device)
        for metric in self.metrics.values():
            if isinstance(outputs, tuple):
                metric.update(*outputs)
            else:
                metric.update(outputs)
        return self.backend.fetch([loss])[0], num_samples(batch)

    def _mean(self, losses: dict[int, tuple[float, int]]) -> float:
        together: dict[int, tuple[float, int]] = {}
        for part in self.backend.all_gather(losses):
            together.update(part)
        total, num = 0.0, 0
        for _, (loss, count) in sorted(together.items()):
            total += loss * count  # not sum(), which rounds otherwise from Python 3.12 on
            num += count
        return total / num

    def _value(self, metric: "Metric") -> Any:
        with warnings.catch_warnings():
            # A rank without a batch has nothing to say, and that is in order.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            value = metric.compute()
        return plain(value)

    def _by_rank(self, metric: "Metric", state: Tensor, group: Any = None) -> list[Tensor]:
        """Gather a metric's state, whose shape may differ over the ranks, in rank order."""
        parts = self.backend.all_gather((metric.update_called, state.detach().cpu()))
        # A rank without a batch would add its defaults: to a mean, or as floats to a list of integers.
        told = [part for updated, part in parts if updated] or [part for _, part in parts]
        return [part.to(state.device) for part in told]


class Together:
    """Lets ranks, each at batches of its own, find out every half second or so whether one of them is to stop.

    Each time they all say at once how long it took since the last, and take as many batches to the next time as would
    have taken half a second on the slowest, at most twice as many as before.
    """

    def __init__(self, backend: Backend, wish: Callable[[], bool], every_s: float = 0.5) -> None:
        self._backend = backend
        self._wish = wish
        self._every_s = every_s
        self._every, self._left = 1, 0
        self._met: float | None = None

    def stop(self) -> bool:
        """Return, before a batch of this rank, whether all are to stop."""
        if self._left and not self._wish():
            self._left -= 1
            return False
        asked, _ = self._meet(done=False)
        self._left = self._every - 1
        return asked

    def stop_before_all_are_done(self) -> bool:
        """Wait, after this rank's last batch, for the others; return whether all are to stop before they are done."""
        done = asked = False
        while not (asked or done):
            asked, done = self._meet(done=True)
        return asked and not done

    def _meet(self, *, done: bool) -> tuple[bool, bool]:
        """Return whether any rank is to stop, and whether all are done."""
        elapsed = self._every_s if self._met is None else time.perf_counter() - self._met
        said = self._backend.all_gather((self._wish(), done, elapsed))
        self._met = time.perf_counter()
        slowest = max(elapsed for _, _, elapsed in said)
        self._every = max(1, min(2 * self._every, int(self._every * self._every_s / max(slowest, 1e-9))))
        return any(asked for asked, _, _ in said), all(over for _, over, _ in said)


def plain(value: Any) -> Any:
    """Return a metric's value as plain numbers, lists and dicts."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value
