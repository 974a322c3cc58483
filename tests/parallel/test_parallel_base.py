"""Gradient accumulation: which iterations open and close an update, and what is held back under DDP."""

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.backend.base import Backend
from disttrain.parallel import Accumulation, Gradients
from disttrain.parallel.base import Meeting


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
    after = []
    for iteration in (1, 2):
        for x in gradients.microbatches(torch.full((1, 1), 10.0 * iteration + backend.rank), iteration):
            output: Tensor = ddp(x)
            output.sum().backward()
        after.append(model.weight.grad.item())
    return after


def test_ranks_meet_only_where_an_update_closes(ranks: Ranks) -> None:
    assert ranks(2, gradients_after_each_iteration) == [[10.0, 31.0], [11.0, 31.0]]


def test_a_meeting_is_told_in_words() -> None:
    meeting = Meeting()
    assert str(meeting) == "no gradients yet"
    meeting.begin(7)
    meeting.num_buckets = 2
    assert str(meeting) == "the gradients of step 7 are on their way (buckets so far: 2)"
    with meeting.waits():
        meeting.over = True
    assert str(meeting) == "the gradients of step 7 have met"
    assert meeting.waited_s is not None
    assert meeting.waited_s >= 0
