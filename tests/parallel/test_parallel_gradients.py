"""Gradient accumulation: the iterations that open and close an update, and what DDP sends only at its end."""

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.backend.base import Backend
from disttrain.parallel import Accumulation, Gradients
from disttrain.parallel.gradients import GradientProgress


def test_an_update_opens_at_its_first_iteration_and_closes_at_its_last() -> None:
    gradients: Gradients = Accumulation(nn.Linear(1, 1), steps=3)
    assert [gradients.opens(i) for i in range(1, 8)] == [True, False, False, True, False, False, True]
    assert [gradients.closes(i) for i in range(1, 8)] == [False, False, True, False, False, True, False]
    assert gradients.divisor == 3
    assert not gradients.several
    assert list(gradients.microbatches("a batch", 1)) == ["a batch"]


@pytest.mark.parametrize("steps", [0, -2])
def test_fewer_than_one_step_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"must be at least 1, got {steps}"):
        Accumulation(nn.Linear(1, 1), steps)


def gradients_after_each_iteration(backend: Backend) -> list[float]:
    model = nn.Linear(1, 1, bias=False)
    ddp = DistributedDataParallel(model, process_group=backend.process_group)
    gradients = Accumulation(ddp, steps=2)
    gradient_after = []
    for iteration in (1, 2):
        for x in gradients.microbatches(torch.full((1, 1), 10.0 * iteration + backend.rank), iteration):
            output: Tensor = ddp(x)
            output.sum().backward()
        gradient_after.append(model.weight.grad.item())
    return gradient_after


def test_gradients_meet_only_in_the_iteration_that_closes_an_update(ranks: Ranks) -> None:
    assert ranks(2, gradients_after_each_iteration) == [[10.0, 31.0], [11.0, 31.0]]


def test_progress_is_described_in_words() -> None:
    progress = GradientProgress()
    assert str(progress) == "no gradients yet"
    progress.begin(7)
    progress.num_buckets = 2
    assert str(progress) == "the gradients of step 7 are on their way (buckets so far: 2)"
    with progress.waits():
        progress.over = True
    assert str(progress) == "the gradients of step 7 have met"
    assert progress.waited_s is not None
    assert progress.waited_s >= 0
