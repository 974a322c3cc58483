"""A step that is left out changes nothing, and the other steps give the same results as without it."""

import pytest
import torch
from torch import Tensor, nn

from disttrain.engine import create_supervised_trainer
from disttrain.parallel import Accumulation, Gradients, SlotGradients, Slots
from disttrain.parallel.leaving_out import LeavingOut

NUM_SLOTS = 2


def train(left_out: set[int], steps: list[int]) -> tuple[list[list[Tensor]], dict[str, Tensor], list[bool]]:
    """Train the steps with these numbers; return the outputs, the state and the arguments of `after_step`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    gradients: Gradients = SlotGradients(model, Slots(NUM_SLOTS), seed=3)
    updates: list[bool] = []
    trainer = create_supervised_trainer(
        model,
        optimizer,
        nn.functional.mse_loss,
        output_transform=lambda x, y, y_pred, loss: loss.detach(),
        gradients=LeavingOut(gradients, lambda step: step in left_out),
        after_step=updates.append,
    )
    outputs = []
    for step in steps:
        x = torch.randn(NUM_SLOTS, 6, 4, generator=torch.Generator().manual_seed(step))
        trainer.state.iteration = step
        outputs.append(trainer._process_function(trainer, [(part, part.sum(1, keepdim=True)) for part in x]))
    state = {**model.state_dict(), **{f"step {i}": s["step"] for i, s in optimizer.state_dict()["state"].items()}}
    return outputs, state, updates


def test_nothing_happens_in_a_step_that_is_left_out() -> None:
    without, expected, _ = train(set(), [1, 2, 4])
    outputs, state, updates = train({3}, [1, 2, 3, 4])
    assert [len(output) for output in outputs] == [NUM_SLOTS, NUM_SLOTS, 0, NUM_SLOTS]
    assert [outputs[i] for i in (0, 1, 3)] == without
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert updates == [True] * 3


def test_gradients_with_one_output_per_step_are_refused() -> None:
    with pytest.raises(ValueError, match="several outputs"):
        LeavingOut(Accumulation(nn.Linear(1, 1)), lambda step: False)
