"""A small model whose weights a handler averages; with KEPT=0 in the environment, the run does not keep the average."""

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from disttrain import Config, Engine, Events


class Average:
    """A moving average of the parameters, cut like them, and the number of its updates."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.num_updates = 0

    def update(self, model: nn.Module) -> None:
        self.num_updates += 1
        for name, weight in model.named_parameters():
            self.tensors[name].lerp_(weight.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors, self.num_updates = dict(state["tensors"]), state["num_updates"]


def average(trainer: Engine, run: Any) -> None:
    averaged = Average(run.model)
    if os.environ.get("KEPT") != "0":
        run.keep("average", averaged)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: averaged.update(run.model))


def points() -> Dataset[tuple[Tensor, ...]]:
    x = torch.randn(64, 5)
    return TensorDataset(x, x.sum(1, keepdim=True))


config = Config(
    name="averaged",
    seed=2,
    model=lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)),
    train_data=points,
    loss=nn.MSELoss(),
    optimizer=partial(torch.optim.AdamW, lr=1e-2),
    global_batch_size=8,
    max_epochs=2,
    handlers=[average],
)
