"""Statistics of orders: p-values, each the probability that a true shuffle is at least as uneven."""

import math

import numpy as np
import torch


def chi_square(counts, num_constraints=1, sampled=0.0):
    """Return the p-value of counts of equal expectation; `sampled` is the counted part of the whole order."""
    expected = counts.sum() / counts.size
    # Counts without replacement vary less than counts with replacement, by the factor of the part that was not counted.
    statistic = ((counts - expected) ** 2 / expected).sum() / (1 - sampled)
    degrees = counts.size - num_constraints
    return torch.special.gammaincc(
        torch.tensor(degrees / 2, dtype=torch.float64), torch.tensor(statistic / 2, dtype=torch.float64)
    ).item()


def buckets(values, n, count):
    return (values.astype(np.float64) * (count / n)).astype(np.int64)


def p_values(order, n, start=0):
    """Yield (name, p-value) of a part of an order of n indices, which begins at position `start`."""
    size = len(order)
    half = 2 ** ((n - 1).bit_length() // 2)
    if size < n:
        yield "uniform positions", chi_square(np.bincount(buckets(order, n, 256), minlength=256), sampled=size / n)
    # The position in the order against the index, coarsely, and the low bits of both. The positions are evenly spread
    # by themselves, which is one constraint for each row. So are the indices, if all of them are counted.
    positions = np.arange(start, start + size)
    for name, rows, columns in (
        ("position and index", buckets(positions - start, size, 32), buckets(order, n, 32)),
        ("their low bits", positions % 64, order % 64),
    ):
        side = 32 if name == "position and index" else 64
        counts = np.bincount(rows * side + columns, minlength=side * side)
        yield name, chi_square(counts, 2 * side - 1 if size == n else side)
    for lag in (1, 2, min(half // 2, 2**14), min(half, 2**15)):
        before, after = order[:-lag], order[lag:]
        yield f"gaps at {lag}", chi_square(np.bincount(buckets((after - before) % n, n, 256), minlength=256))
        yield f"differing bits at {lag}", chi_square(np.bincount((after ^ before) % 256, minlength=256))
        correlation = np.corrcoef(before, after)[0, 1] + 1 / n
        yield f"correlation at {lag}", math.erfc(abs(correlation) * math.sqrt((size - lag) / 2))
    fours = np.argsort(order[: size // 4 * 4].reshape(-1, 4), axis=1) @ [64, 16, 4, 1]
    yield "orders of four", chi_square(np.unique(fours, return_counts=True)[1])
