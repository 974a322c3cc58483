"""The model over the whole validation data: every sample exactly once, on any number of ranks.

*Contract*: batches are the same on any world size, and a rank takes whole ones. So every sample is evaluated once, on
one rank, and a metric is that of the data set. What a batch computes depends on its number alone: the generators are
seeded for it, and the model's buffers are those that the evaluation began with. Batch losses, and the values beside
them, are folded in batch order in float64, weighted by the number of samples, or of targets that count; metric states
are merged in rank order. Afterwards generators, buffers and parameters are bit for bit as before. An optimizer with
`eval` and `train` (schedule-free ones) is switched around the evaluation.

*Errors*: DisttrainError if the model changes a parameter while it is evaluated. ConfigError on every rank if batches
have values of other names.

*Cost*: a copy of the buffers, and of the parameters only for an optimizer with `eval`. To be able to stop, the ranks
wait for each other about twice a second, and once more at the end.
"""

import functools
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disttrain.backend import Backend
from disttrain.engine.step_defaults import to_device
from disttrain.engine.supervised import StepResult
from disttrain.errors import DataError, DisttrainError
from disttrain.handlers.values import SlotValues, ValueNames, fetch_values, fold_values, keep
from disttrain.parallel import mean_over_slots
from disttrain.parallel.fingerprints import Versions, versions
from disttrain.precision import Precision
from disttrain.run.evaluation_point import evaluating
from disttrain.seeding import keep_random_state, seed_for

if TYPE_CHECKING:
    from torchmetrics import Metric

Compute = Callable[[nn.Module, Any], StepResult]
"""(model, batch) -> (mean loss of the batch, outputs, values); the metrics are updated with the outputs."""
Batches = Iterable[tuple[int, Any]]
"""(batch number, batch) of one rank."""
Results = dict[int, tuple[float, int, SlotValues]]
"""By batch number: the loss, the number of samples or targets that count, and the values beside the loss."""


class Evaluation:
    """Evaluates `model` over `batches()`, the (batch number, batch) of this rank; there may be none.

    `count(number, batch)` is the number of samples of a batch, or of its targets that count. `seed` is the run's.
    `gathered()` is the context in which each rank may call the model as often as it likes. `averaged()` is one in which
    the parameters hold the values that are evaluated.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Callable[[], Batches],
        compute: Compute,
        metrics: Mapping[str, "Metric"],
        *,
        count: Callable[[int, Any], int],
        seed: int,
        precision: Precision,
        backend: Backend,
        optimizer: Optimizer | None = None,
        gathered: Callable[[], AbstractContextManager[None]] = nullcontext,
        averaged: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model = model
        self.batches = batches
        self.compute = compute
        self.metrics = dict(metrics)
        self.count = count
        self.seed = seed
        self.precision = precision
        self.backend = backend
        self.optimizer = optimizer
        self.gathered = gathered
        self.averaged = averaged
        for metric in self.metrics.values():
            self._gather_by_backend(metric)

    def _gather_by_backend(self, metric: "Metric") -> None:
        """Let the metric gather through the run's backend; torchmetrics would ask torch.distributed by itself."""
        from torchmetrics import Metric  # slow to import, and here already: the metric is one

        for part in metric.modules():
            if isinstance(part, Metric):
                part.dist_sync_fn = functools.partial(self._by_rank, part)
                part.distributed_available_fn = lambda: self.backend.world_size > 1

    @keep_random_state
    def run(
        self, stop: Callable[[], bool] | None = None, watched: Callable[[Batches], Batches] = lambda batches: batches
    ) -> dict[str, Any] | None:
        """Return the validation loss and the metrics, the same on every rank.

        None, on every rank, if `stop()` returned True before a batch of any rank. `watched` wraps this rank's batches.
        """
        # One by one: a part of the model may be held in evaluation mode, as a frozen batch norm is.
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        for metric in self.metrics.values():
            metric.reset()
        try:
            together = None if stop is None else StopTogether(self.backend, stop)
            with torch.no_grad(), evaluating(self.optimizer, self.model), self.averaged(), self.gathered():
                results = self._results(watched(self.batches()), together)
        finally:
            for module in training:
                module.training = True
        if results is None:
            return None
        return {**self._folded(results), **{name: self._value(metric) for name, metric in self.metrics.items()}}

    def _results(self, source: Batches, together: "StopTogether | None") -> Results | None:
        """Return the results of this rank's batches, None if the ranks stop before their end."""
        results: Results = {}
        batches, done = iter(source), False
        unchanged = UnchangedModel(self.model)
        while not done:
            if together is not None and together.stop():
                return None  # the iterator ends with this frame, and its workers with it
            numbered = next(batches, None)
            if numbered is None:
                done = True
            else:
                number, batch = numbered
                loss, values = self._evaluate(number, batch)
                results[number] = loss, self.count(number, batch), values
                unchanged.restore()
        return None if together is not None and together.stop_before_all_are_done() else results

    def _evaluate(self, number: int, batch: Any) -> tuple[float, SlotValues]:
        self.backend.seed(seed_for(self.seed, "evaluation", number))
        with self.precision.forward():
            loss, outputs, values = self.compute(self.model, batch)
        kept = keep(values)
        self.backend.flush()
        outputs = to_device(outputs, self.backend.metrics_device)
        for metric in self.metrics.values():
            update_metric(metric, outputs)
        return self.backend.fetch([loss])[0], fetch_values(self.backend, [kept])[0]

    def _folded(self, results: Results) -> dict[str, float | None]:
        """Return the loss and the values over all batches of all ranks."""
        together: Results = {}
        for part in self.backend.all_gather(results):
            together.update(part)
        losses, counts, values = zip(*(result for _, result in sorted(together.items())), strict=True)
        mean = mean_over_slots(losses, counts)
        if mean is None:
            raise DataError("valid_data: expected a target that counts, got weight 0 for every batch")
        places = [f"batch {number} of the validation data" for number in sorted(together)]
        names = ValueNames()
        for of_batch, count, place in zip(values, counts, places, strict=True):
            names.check(of_batch, place, counts=count > 0)
        return {"loss": mean, **fold_values(values, counts, places)}

    def _value(self, metric: "Metric") -> Any:
        with warnings.catch_warnings():
            # A rank without a batch has no value, and that is in order.
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            value = metric.compute()
        return plain_value(value)

    def _by_rank(self, metric: "Metric", state: Tensor, group: Any = None) -> list[Tensor]:
        """Gather a metric's state, whose shape may differ over the ranks, in rank order."""
        parts = self.backend.all_gather((metric.update_called, state.detach().cpu()))
        # A rank without a batch would add its defaults: to a mean, or as floats to a list of integers.
        updated_parts = [part for updated, part in parts if updated] or [part for _, part in parts]
        return [part.to(state.device) for part in updated_parts]


class UnchangedModel:
    """The buffers of a model, put back after each batch that changed them; no parameter may change."""

    def __init__(self, model: nn.Module) -> None:
        self._owners = [
            (module, name)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._before = [buffer.clone() for buffer in self._buffers()]
        self._buffer_versions = self._versions_of_buffers()
        self._model = model
        self._parameter_versions = versions(model.named_parameters())

    def _buffers(self) -> list[Tensor]:
        return [module._buffers[name] for module, name in self._owners]  # type: ignore[misc]

    def _versions_of_buffers(self) -> Versions:
        return versions((str(number), buffer) for number, buffer in enumerate(self._buffers()))

    def restore(self) -> None:
        """Put the buffers back, if a batch changed them; DisttrainError if it changed a parameter."""
        now = versions(self._model.named_parameters())
        for name, before in self._parameter_versions.items():
            if now.get(name) != before:
                raise DisttrainError(
                    f"the model changed its parameter {name} while it was evaluated; expected an evaluation that "
                    "changes nothing: change it `if self.training`, or make it a buffer"
                )
        if self._versions_of_buffers() != self._buffer_versions:
            for (module, name), value in zip(self._owners, self._before, strict=True):
                module._buffers[name] = value.clone()
            self._buffer_versions = self._versions_of_buffers()


class StopTogether:
    """Asks all ranks about twice a second whether any was told to stop; ranks may be at different batches.

    Each time the ranks gather how long it took since the last time. The number of batches until the next is what the
    slowest rank would do in half a second, and at most twice as many as before.
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
        by_rank = self._backend.all_gather((self._wish(), done, elapsed))
        self._met = time.perf_counter()
        slowest = max(elapsed for _, _, elapsed in by_rank)
        self._every = max(1, min(2 * self._every, int(self._every * self._every_s / max(slowest, 1e-9))))
        return any(asked for asked, _, _ in by_rank), all(over for _, over, _ in by_rank)


def update_metric(metric: "Metric", outputs: Any) -> None:
    """Update a metric with the outputs of a forward; a tuple holds the arguments of `update`."""
    if isinstance(outputs, tuple):
        metric.update(*outputs)
    else:
        metric.update(outputs)


def plain_value(value: Any) -> Any:
    """Return a metric's value as plain numbers, lists and dicts."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain_value(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(part) for part in value]
    return value
