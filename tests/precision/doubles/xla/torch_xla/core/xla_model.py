"""A double of the one function that the step calls; `calls` records how."""

from typing import Any

import torch

calls: list[dict[str, Any]] = []


def optimizer_step(optimizer: torch.optim.Optimizer, barrier: bool = False, **options: Any) -> Any:
    calls.append({"optimizer": optimizer, "barrier": barrier, **options})
    return optimizer.step()
