"""Wrong: the validation data has noise from a generator that is not seeded, so no two evaluations are the same.

The training is deterministic. `disttrain verify` reports that the weights were the same, but not the validation loss.
"""

import numpy as np
import torch
from sound import Digits, fields

from disttrain import Config


class Noisy(Digits):
    def __init__(self) -> None:
        super().__init__()
        self.x += 0.1 * torch.from_numpy(np.random.default_rng().standard_normal(self.x.shape)).float()


config = Config(**{**fields, "valid_data": Noisy})
