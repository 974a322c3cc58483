"""Wrong: the dataset draws from a generator of its own that is not seeded.

`disttrain verify` reports that the samples were the same, but not the loaded data.
"""

import numpy as np
import torch
from sound import Digits, fields

from disttrain import Config


class OwnGenerator(Digits):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng()

    def noise(self) -> torch.Tensor:
        return 0.1 * torch.from_numpy(self.generator.standard_normal(64)).float()


config = Config(**{**fields, "train_data": OwnGenerator})
