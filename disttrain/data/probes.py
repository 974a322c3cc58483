"""Probes: single samples that are loaded before a run begins, to compare their contents with those of other ranks.

*Contract*: a probe is loaded under a seed of its own, in the process that loads the run's batches. Only its digest
leaves that process. A sample that raises an exception has the exception's type as its digest, because the exception
itself belongs to the step that needs the sample.
"""

from collections.abc import Callable
from typing import Any

from disttrain.data.sampler import SeededBatch
from disttrain.seeding import seed_for

Digest = Callable[[Any], str]
"""Turns a sample into a text that is equal for equal samples. A function of a module, because workers get it."""


class Probe(SeededBatch):
    """One sample to load and to digest."""

    def __init__(self, index: int, *, seed: int, digest: Digest) -> None:
        super().__init__([index], seed=seed_for(seed, "probe", index), name=f"sample {index}", run_seed=seed)
        self.digest = digest


def probed_indices(num_samples: int, count: int) -> list[int]:
    """Return up to `count` fixed indices of a dataset: the first, the last, and others in between."""
    between = [seed_for(0, "probed", number) % num_samples for number in range(max(0, count - 2))]
    return sorted({0, num_samples - 1, *between})
