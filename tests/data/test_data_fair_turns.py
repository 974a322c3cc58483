"""Fair turns against counting: every source has its share of any first turns, less than one turn more or less."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from order_statistics import chi_square

from disttrain.data.fair_turns import LONGEST_PERIOD, FairTurns

small = st.lists(st.integers(1, 40), min_size=1, max_size=8)
# Decimals with many digits: they have no small common denominator.
decimals = st.lists(st.floats(0.01, 1).map(repr), min_size=2, max_size=8)
positions = st.sampled_from([0, 63, 64, 10**9, 2**40 + 7]) | st.integers(0, 10**12)


def fractions(weights):
    parts = [Fraction(weight) for weight in weights]
    return [part / sum(parts) for part in parts]


@settings(deadline=None, max_examples=80)
@given(small | decimals, positions, st.integers(1, 200), st.integers(0, 9))
def test_counts_are_exact_to_one_turn_at_every_position_and_those_of_counting(weights, start, length, key):
    shares = fractions(weights)
    turns = FairTurns(shares, key)
    counted = turns.counts(start)
    assert sum(counted) == start
    sources, earlier = turns.at(np.arange(start, start + length))
    for position, source, before in zip(range(start, start + length), sources, earlier, strict=True):
        assert all(abs(each - position * share) < 1 for each, share in zip(counted, shares, strict=True))
        assert before == counted[source]
        counted[source] += 1
    assert FairTurns(shares, key).counts(start + length) == counted


@settings(deadline=None, max_examples=30)
@given(small | decimals, st.lists(st.integers(0, 10**5), min_size=1, max_size=30))
def test_a_position_has_one_turn_whatever_else_is_asked_for(weights, asked):
    shares = fractions(weights)
    together = FairTurns(shares, 3).at(np.array(asked))
    alone = [FairTurns(shares, 3).at(np.array([position])) for position in asked]
    assert [each.tolist() for each in together] == [[int(each[i][0]) for each in alone] for i in (0, 1)]


@pytest.mark.parametrize("weights", [[3, 7], [1, 1], [1, 2, 3, 4], [19, 1], ["0.5123456", "0.4876544"]])
def test_each_place_of_a_batch_gets_every_source_by_its_share(weights):
    """A slot is some places of a global batch, and must not always have the samples of one source."""
    shares = fractions(weights)
    sources, _ = FairTurns(shares, 1).at(np.arange(100 * 600))
    by_place = sources.reshape(-1, 100)
    for source, share in enumerate(shares):
        found = (by_place == source).mean(axis=0)
        assert np.all(found > float(share) * 0.3), (weights, source)
        assert found.mean() == pytest.approx(float(share), abs=1e-4)


def test_equal_shares_are_drawn_in_any_order():
    sources, _ = FairTurns([Fraction(1, 3)] * 3, 5).at(np.arange(66 * 500))
    orders, counts = np.unique(sources.reshape(-1, 3), axis=0, return_counts=True)
    assert len(orders) == 6
    assert chi_square(counts) > 1e-3


def test_other_keys_give_other_turns():
    turns = {tuple(FairTurns([Fraction(3, 10), Fraction(7, 10)], key).at(np.arange(60))[0]) for key in range(20)}
    assert len(turns) == 20


def test_shares_with_and_without_a_period_are_both_tried():
    assert max(fractions([1, 2, 3])[0].denominator, 6) <= LONGEST_PERIOD
    assert fractions(["0.1234567", "0.7"])[0].denominator > LONGEST_PERIOD
