"""A training whose every number is exact in float32, so that its bits are the same on any processor.

Features are -1, 0 or 1, the loss is L1 (its gradient is a sign), rates and momentum are powers of two: no sum is
ever rounded. `killed/` beside this file is what disttrain 7a2b9a5 left of it on 2 ranks, killed by SIGKILL in step 8
(DISTTRAIN_TEST_KILL_AT=8) after the checkpoint of step 6; `whole/` is what the same code left of the whole run.
"""

import os
import signal
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from disttrain import Config, Engine, Events


class Net(nn.Module):
    """A linear layer behind dropout, and a buffer that counts the samples it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(8, 1)
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))
        with torch.no_grad():
            self.linear.weight.copy_(torch.randint(-4, 5, self.linear.weight.shape) / 8)
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_seen += len(x)
        return self.linear(self.dropout(x))


def data(num_samples: int) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-1, 2, (num_samples, 8), generator=generator).float()
    return TensorDataset(x, x @ torch.tensor([[2.0], [-1], [0], [1], [0.5], [-2], [1], [0]]))


def killed(trainer: Engine, run: object) -> None:
    step = int(os.environ.get("DISTTRAIN_TEST_KILL_AT", "0"))
    trainer.add_event_handler(
        Events.ITERATION_STARTED(lambda _, i: i == step), lambda: os.kill(os.getpid(), signal.SIGKILL)
    )


config = Config(
    name="old",
    seed=3,
    model=Net,
    train_data=partial(data, 64),
    valid_data=partial(data, 32),
    loss=nn.L1Loss(),
    optimizer=partial(torch.optim.SGD, lr=0.125, momentum=0.5),
    schedule=lambda optimizer, total_steps: torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5),
    global_batch_size=16,
    num_slots=4,
    max_steps=12,
    handlers=[killed],
    checkpoint={"every_steps": 3, "keep": 2, "monitor": "loss"},
    validate={"every_steps": 3},
    ledger={"every_steps": 1},
)
