"""Draws with replacement: their frequencies, their independence, and weights of 0, against statistics."""

import numpy as np
import pytest
import torch

from disttrain.data import Weighted
from disttrain.errors import ConfigError

WEIGHTS = np.array([3.0, 0.0, 1.0, 0.5, 2.5, 0.0, 1.0, 2.0])
DRAWS = 40_000


def draws(seed=1, epoch=0, weights=WEIGHTS):
    order = Weighted(range(len(weights)), seed, 8, weights=weights, num_samples=DRAWS)
    assert len(order) == DRAWS
    return order.at(epoch, np.arange(DRAWS))


def p_value(counts, expected):
    """Return the probability that counts differ at least as much from what is expected."""
    statistic = float(((counts - expected) ** 2 / expected).sum())
    degrees = torch.tensor((counts.size - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)).item()


def test_frequencies_are_the_weights_in_every_epoch_and_seed():
    shares = WEIGHTS / WEIGHTS.sum()
    found = []
    for seed in range(4):
        for epoch in (0, 1, 10**6):
            counts = np.bincount(draws(seed, epoch), minlength=len(WEIGHTS))
            assert counts[1] == counts[5] == 0
            found.append(p_value(counts[shares > 0], (shares * DRAWS)[shares > 0]))
    assert min(found) > 1e-3
    assert max(found) < 1 - 1e-3
    assert 0.3 < np.mean(found) < 0.7


@pytest.mark.parametrize("lag", [1, 2, 8, 1024])
def test_draws_are_independent_of_those_before_and_of_other_epochs(lag):
    positive = np.flatnonzero(WEIGHTS)
    place = np.searchsorted(positive, draws())
    other = np.searchsorted(positive, draws(epoch=lag))
    shares = WEIGHTS[positive] / WEIGHTS.sum()
    for before, after in ((place[:-lag], place[lag:]), (place, other)):
        counts = np.bincount(before * len(positive) + after, minlength=len(positive) ** 2)
        assert p_value(counts, np.outer(shares, shares).ravel() * len(before)) > 1e-3


def test_one_sample_alone_and_weights_of_any_size():
    assert set(draws(weights=np.array([0, 0, 5e-300, 0]))) == {2}
    huge = draws(weights=np.array([1e308, 1e308]))
    assert abs((huge == 0).mean() - 0.5) < 0.02


def test_weights_by_a_function_of_the_data():
    labels = [0, 0, 0, 1]

    def balanced(data):
        return 1 / np.bincount(data)[data]

    found = Weighted(labels, 1, 2, weights=balanced, num_samples=9000).at(0, np.arange(9000))
    assert abs((found == 3).mean() - 0.5) < 0.02
    assert len(Weighted(labels, 1, 2, weights=balanced)) == 4


def test_the_fingerprint_is_that_of_the_weights():
    def fingerprint(weights):
        return Weighted(range(3), 1, 2, weights=weights).fingerprint

    assert fingerprint([1, 2, 3]) == fingerprint(np.array([1.0, 2.0, 3.0])) != fingerprint([1, 2, 4])


def test_weights_that_are_all_0_are_refused():
    with pytest.raises(ConfigError, match=r"order.weights: expected a weight above 0, got 3 weights that are all 0"):
        Weighted(range(3), 1, 2, weights=[0, 0, 0])
    with pytest.raises(
        ConfigError, match=r"order.num_samples: expected a number of draws in an epoch, at least 1, got 0"
    ):
        Weighted(range(3), 1, 2, weights=[1, 1, 1], num_samples=0)
