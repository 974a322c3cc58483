"""An order that draws samples with replacement, each with its own probability."""

import hashlib
from typing import Any

import numpy as np

from disttrain.data.order import count, per_sample
from disttrain.data.permutation import Indices, split_mix
from disttrain.errors import ConfigError
from disttrain.seeding import seed_for

_HASHED_BITS = 53
"""The bits of a hash that become a float64 in [0, 1)."""


class Weighted:
    """Each position draws one sample, in proportion to the weights, whatever the other positions draw.

    `weights`: a number of at least 0 for each sample, or a function of the data that returns them. They need no sum of
    1; a sample of weight 0 is never drawn. `num_samples`: the positions in an epoch, by default as many as samples.

    *Contract*: the hash of (seed, epoch, position) is a number in [0, 1); the sample is the one in whose part of the
    summed weights it falls. So draws are independent, and there are no epochs over the samples: some come twice, some
    not at all.
    *Errors*: ConfigError for weights that do not fit the data, or are all 0.
    *Cost*: 8 bytes for each sample; for each position a binary search.
    """

    def __init__(
        self, data: Any, seed: int, global_batch_size: int, *, weights: Any, num_samples: int | None = None
    ) -> None:
        values = per_sample("weights", weights, data)
        if not values.any():
            raise ConfigError(f"order.weights: expected a weight above 0, got {len(values)} weights that are all 0")
        self._seed = seed
        self._length = len(values) if num_samples is None else count("num_samples", num_samples, "draws in an epoch")
        self._summed = np.cumsum(values / values.max())  # from left to right, so the same bits everywhere
        self._last = int(np.flatnonzero(values)[-1])
        self.fingerprint = hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return self._length

    def at(self, epoch: int, positions: Indices) -> Indices:
        """Return the samples that are drawn at `positions`."""
        words = split_mix(positions.astype(np.uint64), seed_for(self._seed, "order", epoch))
        fractions = (words >> np.uint64(64 - _HASHED_BITS)).astype(np.float64) * 2.0**-_HASHED_BITS
        found = np.searchsorted(self._summed, fractions * self._summed[-1], side="right")
        indices: Indices = np.minimum(found, self._last)  # a product that was rounded up to the whole sum
        return indices
