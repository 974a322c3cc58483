"""Variants of schedules: all of torch.optim.lr_scheduler, and some that people write."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import nn, optim
from torch.optim import lr_scheduler as rates
from torchmetrics.classification import MulticlassAccuracy
from zoo_lives import Fields
from zoo_losses import LABELLED
from zoo_optimizers import in_groups


def by(kind: Any, *args: Any, **options: Any) -> Callable[[], Fields]:
    return lambda: {"schedule": lambda optimizer, total_steps: kind(optimizer, *args, **options)}


def one_cycle(optimizer: Any, total_steps: int) -> Any:
    return rates.OneCycleLR(optimizer, max_lr=3e-2, total_steps=total_steps + 1)


def sequential(optimizer: Any, total_steps: int) -> Any:
    parts = [rates.LinearLR(optimizer, 0.1, total_iters=3), rates.CosineAnnealingLR(optimizer, total_steps - 3)]
    return rates.SequentialLR(optimizer, parts, milestones=[3])


def chained(optimizer: Any, total_steps: int) -> Any:
    return rates.ChainedScheduler([rates.ConstantLR(optimizer, 0.5, 3), rates.ExponentialLR(optimizer, 0.9)])


def averaged(optimizer: Any, total_steps: int) -> Any:
    return optim.swa_utils.SWALR(optimizer, swa_lr=1e-3, anneal_epochs=4)


def rate_of_numpy(optimizer: Any, total_steps: int) -> Any:
    return rates.LambdaLR(optimizer, lambda k: 0.5 * (1 + np.cos(np.pi * k / total_steps)))


class Warmup:
    """A schedule of somebody's own, with a state that is no number of torch's."""

    def __init__(self, optimizer: Any, steps: int = 4) -> None:
        self.optimizer, self.steps, self.done = optimizer, steps, 0
        self.base = [group["lr"] for group in optimizer.param_groups]
        self._set()

    def _set(self) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = base * min(1.0, (self.done + 1) / self.steps)

    def step(self) -> None:
        self.done += 1
        self._set()

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "base": self.base}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.base = state["done"], state["base"]


class Forgetful(Warmup):
    """Its state_dict forgets what its rate depends on."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class WeightDecay(Warmup):
    """Moves the weight decay and not the rate."""

    def _set(self) -> None:
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.1 * self.done


TORCHS: dict[str, Callable[[], Fields]] = {
    "ChainedScheduler": lambda: {"schedule": chained},
    "ConstantLR": by(rates.ConstantLR, factor=0.5, total_iters=4),
    "CosineAnnealingLR": by(rates.CosineAnnealingLR, T_max=9),
    "CosineAnnealingWarmRestarts": by(rates.CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    "CyclicLR": by(rates.CyclicLR, 1e-3, 1e-2, step_size_up=3, cycle_momentum=False),
    "ExponentialLR": by(rates.ExponentialLR, gamma=0.9),
    "LRScheduler": lambda: {"schedule": lambda optimizer, total: rates.LRScheduler(optimizer)},
    "LambdaLR": by(rates.LambdaLR, lambda k: 1 / math.sqrt(k + 1)),
    "LinearLR": by(rates.LinearLR, start_factor=0.1, total_iters=6),
    "MultiStepLR": by(rates.MultiStepLR, milestones=[2, 4, 7]),
    "MultiplicativeLR": by(rates.MultiplicativeLR, lambda k: 0.95),
    "OneCycleLR": lambda: {"schedule": one_cycle},
    "PolynomialLR": by(rates.PolynomialLR, total_iters=9, power=2.0),
    "ReduceLROnPlateau": by(rates.ReduceLROnPlateau, patience=0, threshold=0.5),
    "SequentialLR": lambda: {"schedule": sequential},
    "StepLR": by(rates.StepLR, step_size=2, gamma=0.5),
}
"""All of torch.optim.lr_scheduler, by the name of the class."""

VARIANTS: dict[str, Callable[[], Fields]] = {
    **{f"torch_{name}": fields for name, fields in TORCHS.items()},
    "swa": lambda: {"schedule": averaged},
    "cyclic_momentum": lambda: {
        "optimizer": partial(optim.SGD, lr=1e-2, momentum=0.9),
        "schedule": lambda o, n: rates.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, mode="exp_range", gamma=0.9),
    },
    "one_cycle_in_groups": lambda: {"optimizer": in_groups, "schedule": one_cycle},
    "lambda_in_groups": lambda: {
        "optimizer": in_groups,
        "schedule": lambda o, n: rates.LambdaLR(o, [lambda k: 0.9**k, lambda k: 0.8**k]),
    },
    "rate_of_numpy": lambda: {"schedule": rate_of_numpy},
    "plateau_of_a_metric": lambda: {
        "schedule": lambda o, n: rates.ReduceLROnPlateau(o, mode="max", patience=0, threshold=0.3),
        "schedule_monitor": "accuracy",
        "metrics": {"accuracy": partial(MulticlassAccuracy, 3)},
        "loss": nn.CrossEntropyLoss(),
        **LABELLED,
    },
    "plateau_in_groups": lambda: {
        "optimizer": in_groups,
        "schedule": lambda o, n: rates.ReduceLROnPlateau(o, patience=0, threshold=0.5, cooldown=1, min_lr=[1e-4, 1e-3]),
    },
    "own_warmup": lambda: {"schedule": lambda o, n: Warmup(o)},
    "own_forgetful": lambda: {"schedule": lambda o, n: Forgetful(o)},
    "own_weight_decay": lambda: {"schedule": lambda o, n: WeightDecay(o)},
}
