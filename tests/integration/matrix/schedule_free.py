"""A small model under a schedule-free optimizer: it trains at one point and evaluates at another."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from disttrain import Config


class ScheduleFreeSGD(torch.optim.Optimizer):
    """Schedule-free SGD. The parameters are y in training and x in evaluation.

        y = (1 - beta) z + beta x
        z <- z - lr grad(y)
        x <- (1 - c) x + c z,  c = 1 / the number of the step

    *Source*: Defazio et al., The Road Less Scheduled (2024), algorithm 1; as in the authors' package, a step is refused
    in evaluation mode, and an optimizer begins in that mode.
    """

    def __init__(self, parameters: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "num_steps": 0, "train_mode": False})

    @torch.no_grad()
    def _move(self, *, training: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == training:
                continue
            group["train_mode"] = training
            weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
            for parameter in group["params"]:
                if parameter in self.state:
                    parameter.lerp_(self.state[parameter]["z"], weight)

    def eval(self) -> None:
        self._move(training=False)

    def train(self) -> None:
        self._move(training=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                raise RuntimeError("expected a call of train() before the step")
            group["num_steps"] += 1
            beta, share = group["beta"], 1 / group["num_steps"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["z"] = parameter.clone()
                z = state["z"]
                x = parameter.lerp(z, 1 - 1 / beta)
                z.sub_(parameter.grad, alpha=group["lr"])
                x.lerp_(z, share)
                parameter.copy_(z.lerp(x, beta))


def points(num: int) -> Dataset[tuple[Tensor, ...]]:
    x = torch.randn(num, 5, generator=torch.Generator().manual_seed(num))
    return TensorDataset(x, x.sum(1, keepdim=True).tanh())


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))


config = Config(
    name="schedule_free",
    seed=2,
    model=net,
    train_data=partial(points, 64),
    valid_data=partial(points, 22),
    loss=nn.MSELoss(),
    optimizer=partial(ScheduleFreeSGD, lr=0.3),
    global_batch_size=8,
    max_epochs=2,
    validate={"every_steps": 3},
    checkpoint={"monitor": "loss", "keep": 8},
)
