"""An order by length: each epoch is complete, batches are of one length, and what is left out is drawn at random."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from order_statistics import chi_square

from disttrain.data import LengthBuckets
from disttrain.errors import ConfigError


def epoch_of(order, epoch=0):
    return order.at(epoch, np.arange(len(order)))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 9), st.integers(0, 5), st.integers(0, 99))
def test_an_epoch_holds_every_sample_once_and_its_batches_are_sorted_windows(size, batch, window, epoch, seed):
    lengths = np.random.default_rng(seed).integers(1, 30, size)
    found = epoch_of(LengthBuckets(range(size), seed, batch, lengths=lengths, window=window), epoch)
    assert np.array_equal(np.sort(found), np.arange(size))
    whole = found[: size // batch * batch]
    for first in range(0, len(whole), window * batch):
        batches = lengths[whole[first : first + window * batch]].reshape(-1, batch)
        # The batches of a window, one after the other by their shortest and longest, are its sorted lengths.
        in_order = sorted(np.sort(batches, axis=1).tolist(), key=lambda each: (each[0], each[-1]))
        assert np.concatenate(in_order).tolist() == np.sort(batches.ravel()).tolist()
        assert all(np.all(np.diff(each) >= 0) or np.all(np.diff(each) <= 0) for each in batches)


def test_padding_is_short_and_lengths_are_in_no_order_over_the_steps():
    lengths = np.random.default_rng(0).integers(1, 1000, 6400)
    order = LengthBuckets(range(6400), 3, 64, lengths=lengths)
    batches = lengths[epoch_of(order)].reshape(-1, 64)
    assert (batches.max(axis=1) - batches.min(axis=1)).max() < 60
    assert abs(np.corrcoef(np.arange(100), batches.mean(axis=1))[0, 1]) < 0.3
    assert 30 < (batches[:, 0] < batches[:, -1]).sum() < 70  # half of the batches are reversed


def test_what_fills_no_batch_is_left_out_at_random():
    lengths = np.arange(103)
    order = LengthBuckets(range(103), 5, 10, lengths=lengths)
    left_out = np.concatenate([epoch_of(order, epoch)[100:] for epoch in range(3000)])
    assert chi_square(np.bincount(left_out, minlength=103)) > 1e-3


def test_the_batches_of_a_sample_vary_over_the_epochs():
    order = LengthBuckets(range(60), 5, 4, lengths=lambda data: np.arange(len(data)) // 20, window=5)
    mates = set()
    for epoch in range(50):
        batches = epoch_of(order, epoch).reshape(-1, 4)
        mates |= set(batches[(batches == 0).any(axis=1)][0].tolist())
    assert set(range(1, 20)) <= mates


def test_a_window_is_positive():
    with pytest.raises(ConfigError, match=r"order.window: expected a number of global batches, at least 1, got 0"):
        LengthBuckets(range(3), 1, 2, lengths=[1, 2, 3], window=0)
    with pytest.raises(ConfigError, match=r"order.lengths: expected a number of at least 0 for each of the 3 samples"):
        LengthBuckets(range(3), 1, 2, lengths=[1, 2])
