"""A double of the functions that the step calls; `calls` records the calls and their arguments."""

from typing import Any

import torch

calls: list[Any] = []


def optimizer_step(optimizer: torch.optim.Optimizer, barrier: bool = False, **options: Any) -> Any:
    calls.append({"optimizer": optimizer, "barrier": barrier, **options})
    return optimizer.step()


def reduce_gradients(optimizer: torch.optim.Optimizer, **options: Any) -> None:
    calls.append("reduce_gradients")
