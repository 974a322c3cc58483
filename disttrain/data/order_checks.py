"""Checks an order: its form once, before a run begins, and the indices that it gives each time.

*Contract*: `identify` asks for a few positions of two epochs twice, the second time in another order of calls and of
positions. So an order that draws from a generator of its own, or counts its calls, is found before the first step.

*Errors*: ConfigError with one line: what was expected of the order, what it gave, what to do.
"""

import hashlib
from typing import Any

import numpy as np

from disttrain.data.order import Order
from disttrain.data.permutation import Indices
from disttrain.errors import ConfigError, DisttrainError
from disttrain.mistakes import is_mistake, placed
from disttrain.seeding import seed_for

NUM_PROBED, NUM_BETWEEN = 32, 8
"""The positions at an order's start and at its end that are asked for, and those in between, which may cost more."""
PROBED_EPOCHS = (0, 1)


def indices_at(order: Order, num_samples: int, epoch: int, positions: Indices) -> Indices:
    """Return the indices that an order has at positions of any shape, after a check."""
    flat = positions.reshape(-1)
    try:
        found = np.asarray(order.at(epoch, flat))
    except DisttrainError:
        raise
    except Exception as error:
        kind = ConfigError if is_mistake(error) else DisttrainError
        raise kind(f"order: at(epoch={epoch}, positions) raised {placed(error)}") from error
    if found.shape != flat.shape or found.dtype.kind not in "iu":
        raise ConfigError(
            f"order: expected at(epoch, positions) to return integers of shape {flat.shape}, an index for each "
            f"position, got {found.dtype} of shape {found.shape} from {type(order).__name__}"
        )
    if found.size and not (found.min() >= 0 and found.max() < num_samples):
        wrong = int(np.flatnonzero((found < 0) | (found >= num_samples))[0])
        raise ConfigError(
            f"order: expected an index in range({num_samples}), the samples of the data, got {found[wrong]} at "
            f"position {flat[wrong]} of epoch {epoch} from {type(order).__name__}"
        )
    return found.astype(np.int64, copy=False).reshape(positions.shape)


def identify(order: Any, num_samples: int) -> dict[str, Any]:
    """Return the identity of an order: its `order_length` and `order_fingerprint`, as of a dataset.

    *Errors*: ConfigError for an object that is no order, and for one that gives other indices when it is asked again.
    """
    name = type(order).__name__
    if not callable(getattr(order, "at", None)) or not hasattr(type(order), "__len__"):
        raise ConfigError(
            "order: expected a function (data, seed, global_batch_size) that returns an object with __len__() and "
            f"at(epoch, positions), got a {name} from it; docs/order.md shows one"
        )
    length = len(order)
    if length < 1:
        raise ConfigError(f"order: expected at least one position in an epoch, got a {name} of length {length}")
    positions = _probed_positions(length)
    first = {epoch: indices_at(order, num_samples, epoch, positions) for epoch in PROBED_EPOCHS}
    for epoch in reversed(PROBED_EPOCHS):
        again = indices_at(order, num_samples, epoch, positions[::-1].copy())[::-1]
        if wrong := np.flatnonzero(again != first[epoch]).tolist():
            raise ConfigError(
                f"order: expected one index at position {positions[wrong[0]]} of epoch {epoch}, got "
                f"{first[epoch][wrong[0]]} and then {again[wrong[0]]} from {name}; let it depend on the epoch and the "
                "position alone, for example on np.random.default_rng([seed, epoch])"
            )
    own = getattr(order, "fingerprint", None)
    text = "\n".join([type(order).__qualname__, str(length), str(own() if callable(own) else own)])
    digest = hashlib.blake2b(text.encode(), digest_size=8)
    for found in first.values():
        digest.update(found.astype("<i8").tobytes())
    return {"order_length": length, "order_fingerprint": digest.hexdigest()}


def _probed_positions(length: int) -> Indices:
    between = {seed_for(0, "probed", number) % length for number in range(NUM_BETWEEN)}
    ends = {*range(min(length, NUM_PROBED)), *range(max(0, length - NUM_PROBED), length)}
    return np.array(sorted(between | ends), dtype=np.int64)
