"""Wrong: the step depends on the rank, so another number of ranks trains another model.

`disttrain verify` reports that the loaded data was the same, but not the loss, and names the slots.
"""

import torch.distributed as dist
from sound import fields
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from disttrain import Config


def by_rank(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, y = batch
    weight = 1.0 + 0.1 * (dist.get_rank() if dist.is_initialized() else 0)
    logits = model(x)
    return weight * cross_entropy(logits, y), logits


config = Config(**{**fields, "loss": None, "forward": by_rank})
