"""Wrong: the collate function draws from a generator of its own that is not seeded.

`disttrain verify` reports that the samples were the same, but not the loaded data. A dataset with such a generator is
refused when the run starts, which loads a few of its samples twice.
"""

from typing import Any

import numpy as np
import torch
from sound import fields
from torch.utils.data import default_collate

from disttrain import Config


class WithNoise:
    def __init__(self, *seed: int) -> None:
        self.generator = np.random.default_rng(*seed)

    def __call__(self, samples: list[Any]) -> list[Any]:
        x, y = default_collate(samples)
        return [x + 0.1 * torch.from_numpy(self.generator.standard_normal(x.shape)).float(), y]


config = Config(**{**fields, "collate": WithNoise()})
