"""The order of the samples in an epoch: which sample is at which position. Two plain orders: shuffled and sequential.

*Contract*: an `Order` is a pure function of (epoch, position), and any position takes the same time. A config's
`order` makes one: `(data, seed, global_batch_size) -> Order`. `data` is the training data, `seed` the run's seed. The
factory is called on every rank, and must give the same order there.

The positions come as an array and not as a slice, because a rank's part of several steps is no slice: one call serves
all of it. And an order that gets single positions cannot depend on where a slice began.

*Errors*: ConfigError for an order that cannot be one, and for indices outside the data (data/order_checks.py).

*Cost*: see each order. A sampler asks for some 8,192 positions at a time.
"""

import numbers
from typing import Any, Protocol

import numpy as np

from disttrain.data.permutation import IndexShuffle, Indices
from disttrain.errors import ConfigError
from disttrain.mistakes import quoted
from disttrain.seeding import seed_for


class Order(Protocol):
    """The sample at each position of an epoch.

    An order may have a `fingerprint`, an attribute or a method, of what decides about it, as a dataset may. A resumed
    run is refused if it differs.
    """

    def __len__(self) -> int:
        """The number of positions in an epoch, the same in each."""

    def at(self, epoch: int, positions: Indices) -> Indices:
        """Return the index of the sample at each position of an epoch: an array of integers, as long as `positions`.

        `positions` is an int64 array of one dimension, in any order, each in range(len(self)). The result may depend
        on nothing else but the epoch and the position.
        """


class Shuffled:
    """Each epoch is a random permutation of the samples: the order of a run without `order`.

    *Cost*: that of an `IndexShuffle`, some 25 ns for each position.
    """

    def __init__(self, data: Any, seed: int = 0, global_batch_size: int = 1) -> None:
        self._num_samples = len(data)
        self._seed = seed
        self._latest: tuple[int, IndexShuffle] | None = None

    def __len__(self) -> int:
        return self._num_samples

    def at(self, epoch: int, positions: Indices) -> Indices:
        """Return the indices at `positions` of this epoch's permutation."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = (epoch, IndexShuffle(self._num_samples, seed_for(self._seed, "order", epoch)))
        return self._latest[1].at(positions)


class Sequential:
    """Each epoch is the samples one after the other, as the data holds them."""

    def __init__(self, data: Any, seed: int = 0, global_batch_size: int = 1) -> None:
        self._num_samples = len(data)

    def __len__(self) -> int:
        return self._num_samples

    def at(self, epoch: int, positions: Indices) -> Indices:
        """Return the positions: they are the indices."""
        return positions


def count(name: str, value: Any, unit: str) -> int:
    """Return a keyword of an order that must be an integer of at least 1.

    *Errors*: ConfigError with the keyword's name.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"order.{name}: expected a number of {unit}, at least 1, got {value!r}")
    return int(value)


def per_sample(name: str, values: Any, data: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return a number for each sample, from an array or from a function of the data that returns one.

    *Errors*: ConfigError, with the keyword's name, for another number of values, and for values that are not finite
    numbers of at least 0.
    """
    given = values(data) if callable(values) else values
    expected = f"order.{name}: expected a number of at least 0 for each of the {len(data)} samples"
    try:
        array = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{expected}, got a {type(given).__name__} ({quoted(error)})") from error
    if array.shape != (len(data),):
        raise ConfigError(
            f"{expected}, got an array of shape {array.shape}; give one for each sample, in the order of the data"
        )
    if wrong := np.flatnonzero(~(np.isfinite(array) & (array >= 0))).tolist():
        raise ConfigError(
            f"{expected}, got {array[wrong[0]]} for sample {wrong[0]}; repair it or leave that sample out"
        )
    return array
