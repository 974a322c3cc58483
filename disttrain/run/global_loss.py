"""The config's `global_loss`: training and evaluation with a loss over the samples of a whole global batch.

*Contract*: `forward(model, batch)` returns the embeddings of a microbatch: a tensor, or a dict or tuple of tensors,
each with one row for each sample. `global_loss(embeddings)` gets those of all slots. It may be a Module: its parameters
are trained, and its buffers saved, as those of a loss. Validation data is evaluated in groups of batches that are a
global batch; the last group may be smaller. A rank evaluates whole groups. A group counts by its samples, and the
metrics are updated with its embeddings.

*Errors*: ConfigError that names the field, for embeddings without one row for each sample and for a loss that is not
one number.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from disttrain.config import Config
from disttrain.engine.supervised import StepFunction, StepResult
from disttrain.errors import ConfigError
from disttrain.parallel import GlobalLoss, GradientsOverSlots, Slots
from disttrain.precision import Precision
from disttrain.run.evaluation import Evaluation
from disttrain.run.field_places import field_place
from disttrain.run.step_checks import form_of, one_number

ToDevice = Callable[[Any], Any]
"""batch -> the batch on the device"""


class GlobalStep(StepFunction):
    """A StepFunction whose loss is that over all slots of a step; `over_slots` has computed it before a slot runs."""

    over_slots: GlobalLoss

    def __init__(self, config: Config, model: nn.Module, loss: Callable[..., Any], step: Callable[..., Any]) -> None:
        super().__init__(model, loss, step)
        self._config = config

    def forward(self, batch: Any) -> StepResult:
        embeddings = self.embeddings(batch)
        return self.over_slots.slot_loss(embeddings), embeddings, {}

    def embeddings(self, batch: Any) -> Any:
        """Return the embeddings of a microbatch; ConfigError unless all have the same number of rows."""
        assert self.step is not None, "a Config with global_loss has forward"
        embeddings = self.step(self.model, batch)
        leaves = tree_leaves(embeddings)
        if not leaves or not all(isinstance(each, Tensor) and each.ndim for each in leaves):
            raise ConfigError(
                f"{field_place(self._config, 'forward')}: expected embeddings with global_loss, a tensor or a dict of "
                f"tensors [samples, ...], got {form_of(embeddings)}; return no loss and nothing else than tensors"
            )
        return embeddings

    def check_rows(self, embeddings: Any, num_samples: int) -> Any:
        """Return the embeddings; ConfigError unless they have `num_samples` rows."""
        if wrong := [each for each in tree_leaves(embeddings) if len(each) != num_samples]:
            raise ConfigError(
                f"{field_place(self._config, 'forward')}: expected one row for each of {num_samples} samples in all "
                f"embeddings, got {form_of(wrong[0])}; return two views of a sample as two tensors of a dict, several "
                "rows of a sample as [samples, rows, ...]"
            )
        return embeddings

    def loss_over(self, embeddings: Any) -> Tensor:
        """Return the config's loss over embeddings; ConfigError unless it is one number."""
        global_loss: Any = self.loss
        try:
            value = global_loss(embeddings)
        except Exception as error:
            error.add_note(f"global_loss got {form_of(embeddings)}")
            raise
        return one_number(value, self._config, "global_loss")


def minimize_together(
    config: Config,
    step_function: GlobalStep,
    slots: Slots,
    gradients: GradientsOverSlots,
    optimizer: Optimizer,
    precision: Precision,
    process_group: Any,
    move: ToDevice,
) -> None:
    """Let the gradients be those of the loss over the global batch."""
    num_samples = config.global_batch_size // slots.num_slots

    def embed(microbatch: Any) -> Any:
        with precision.forward():
            return step_function.check_rows(step_function.embeddings(move(microbatch)), num_samples)

    def loss(embeddings: Any) -> Tensor:
        with precision.forward():
            return step_function.loss_over(embeddings)

    step_function.over_slots = GlobalLoss(
        slots,
        process_group,
        embed=embed,
        loss=loss,
        backward=lambda value: precision.backward(value, optimizer),
        parameters=step_function.parameters,
    )
    gradients.minimize(step_function.over_slots, rehearses=config.deterministic)


def evaluate_together(evaluation: Evaluation, step_function: GlobalStep, num_together: int, move: ToDevice) -> None:
    """Let an evaluation compute the loss over groups of `num_together` batches, of which each lies on one rank."""
    batches, count = evaluation.batches, evaluation.count

    def compute(_: nn.Module, group: list[Any]) -> StepResult:
        parts = [step_function.embeddings(move(batch)) for batch in group]
        embeddings = tree_map(lambda *each: torch.cat(each), *parts)
        return step_function.loss_over(embeddings), embeddings, {}

    evaluation.batches = lambda: groups_of_batches(batches(), num_together)
    evaluation.compute = compute
    evaluation.count = lambda number, group: sum(
        count(number * num_together + place, batch) for place, batch in enumerate(group)
    )


def groups_of_batches(batches: Iterable[tuple[int, Any]], num_together: int) -> Iterator[tuple[int, list[Any]]]:
    """Yield (group number, its batches) from (batch number, batch), which begin with the first of a group."""
    for number, group in itertools.groupby(batches, key=lambda numbered: numbered[0] // num_together):
        yield number, [batch for _, batch in group]
