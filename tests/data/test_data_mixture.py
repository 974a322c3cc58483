"""A mixture of sources: shares at any step against counting, epochs of each source, changes, statistics, errors."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from order_statistics import p_values
from torch.utils.data import ConcatDataset

from disttrain.data import IndexShuffle, Mixture, Sources
from disttrain.errors import ConfigError

BATCH = 6


def sources_of(*sizes):
    return Sources({f"s{number}": range(size) for number, size in enumerate(sizes)})


def mixture_of(sizes, shares, *, seed=1, **options):
    return Mixture(
        sources_of(*sizes), seed, BATCH, shares=dict(zip(["s0", "s1", "s2"], shares, strict=False)), **options
    )


def run_of(mixture, start, length):
    """Return (source, index in the source) at positions that are counted through all epochs."""
    epochs, positions = np.divmod(np.arange(start, start + length), len(mixture))
    found = np.concatenate([mixture.at(int(e), positions[epochs == e]) for e in np.unique(epochs)])
    ends = np.cumsum(mixture._sizes)
    which = np.searchsorted(ends, found, side="right")
    return which, found - (ends - mixture._sizes)[which]


sizes = st.lists(st.integers(1, 25), min_size=1, max_size=3)
share = st.integers(1, 20) | st.floats(0.05, 1)


@settings(deadline=None, max_examples=60)
@given(sizes, st.data(), st.integers(0, 10**9) | st.just(0), st.integers(1, 200))
def test_shares_are_exact_to_one_sample_at_every_position(of_sources, data, start, length):
    shares = data.draw(st.lists(share, min_size=len(of_sources), max_size=len(of_sources)))
    mixture = mixture_of(of_sources, shares)
    exact = [Fraction(str(each)) for each in shares]
    counted = np.array(mixture.counts(start))
    which, _ = run_of(mixture, start, length)
    for position, source in enumerate(which.tolist(), start):
        for each, part in zip(counted.tolist(), exact, strict=True):
            assert abs(each - position * part / sum(exact)) < 1
        counted[source] += 1
    assert counted.tolist() == mixture.counts(start + length)


@settings(deadline=None, max_examples=40)
@given(sizes, st.data(), st.integers(1, 300))
def test_a_change_counts_from_its_step(of_sources, data, length):
    first, second = (data.draw(st.lists(share, min_size=len(of_sources), max_size=len(of_sources))) for _ in range(2))
    step = data.draw(st.integers(1, 20))
    named = {f"s{number}": each for number, each in enumerate(second)}
    mixture = mixture_of(of_sources, first, changes={step: named})
    which, _ = run_of(mixture, 0, step * BATCH + length)
    assert which[: step * BATCH].tolist() == run_of(mixture_of(of_sources, first), 0, step * BATCH)[0].tolist()
    exact = [Fraction(str(each)) for each in second]
    counted = np.bincount(which[step * BATCH :], minlength=len(of_sources)).tolist()
    assert all(abs(each - length * part / sum(exact)) < 1 for each, part in zip(counted, exact, strict=True))
    assert mixture.counts(step * BATCH + length) == np.bincount(which, minlength=len(of_sources)).tolist()


@settings(deadline=None, max_examples=40)
@given(sizes, st.data(), st.booleans())
def test_each_epoch_of_a_source_is_a_permutation_of_it(of_sources, data, changes):
    shares = data.draw(st.lists(share, min_size=len(of_sources), max_size=len(of_sources)))
    changed = {"changes": {7: {"s0": 1}, 9: dict(zip(["s0", "s1", "s2"], shares, strict=False))}} if changes else {}
    mixture = mixture_of(of_sources, shares, **changed)
    which, indices = run_of(mixture, 0, 400)
    orders = []
    for source, size in enumerate(of_sources):
        epochs = indices[which == source][: (which == source).sum() // size * size].reshape(-1, size)
        assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(size), (len(epochs), 1)))
        orders += [tuple(epoch) for epoch in epochs if size > 12]
    assert len(set(orders)) == len(orders)


def test_the_source_of_each_sample_has_its_name():
    assert mixture_of([3, 2], [1, 1]).sources_of([0, 4, 2, 3]) == ["s0", "s1", "s0", "s1"]
    nameless = Mixture(ConcatDataset([range(3), range(2)]), 1, BATCH, shares=[1, 1])
    assert nameless.sources_of([2, 3]) == ["0", "1"]
    assert nameless.sources_of([]) == []


def test_a_source_of_one_share_alone_is_the_order_of_its_permutations():
    which, indices = run_of(mixture_of([500], [1]), 0, 998)
    assert not which.any()
    halves = [indices[:500], indices[500:998]]
    assert [len(set(half.tolist())) for half in halves] == [500, 498]
    assert halves[0][:498].tolist() != halves[1].tolist()


def test_an_epoch_is_whole_steps_and_positions_go_on_through_epochs():
    mixture = mixture_of([10, 12], [1, 1])
    assert len(mixture) == 18
    assert len(mixture_of([2, 1], [1, 1])) == BATCH
    assert len(mixture_of([10, 12], [1, 1], num_samples=1001)) == 996
    longer = mixture_of([10, 12], [1, 1], num_samples=36)
    assert [each.tolist() for each in run_of(mixture, 5, 90)] == [each.tolist() for each in run_of(longer, 5, 90)]


def test_a_source_that_begins_late_and_one_that_ends():
    mixture = mixture_of([30, 30, 30], [1, 1], changes={5: {"s1": 1, "s2": 3}, 10: {"s2": 1}})
    which, _ = run_of(mixture, 0, 90)
    assert set(which[:30]) == {0, 1}
    assert np.bincount(which[30:60]).tolist() == [0, 8, 22] or np.bincount(which[30:60]).tolist() == [0, 7, 23]
    assert set(which[60:]) == {2}


def test_sources_without_names_have_their_shares_in_order():
    parts = ConcatDataset([range(40), range(10)])
    named = mixture_of([40, 10], [0.2, 0.8])
    unnamed = Mixture(parts, 1, BATCH, shares=[0.2, 0.8])
    assert unnamed.at(0, np.arange(48)).tolist() == named.at(0, np.arange(48)).tolist()
    assert (
        Mixture(parts, 1, BATCH, shares={0: 0.2, 1: 0.8}).at(3, np.arange(9)).tolist()
        == named.at(3, np.arange(9)).tolist()
    )


def test_a_position_far_away_is_computed_from_few_turns():
    """No more turns are computed than at 0: a block, and for shares without a period what leads to its ends."""
    for shares in ([0.7, 0.3], [0.7123456789, 0.3]):
        mixture = mixture_of([1000, 1000], shares)
        mixture.at(10**6, np.arange(8))
        (stage,) = mixture._stages
        assert len(stage.turns._blocks) == 1
        assert len(stage.turns._ends) <= 2


def p_values_of_a_source(size, share, source, seed):
    """Return the p-values of the first epoch of a source in the mixture."""
    mixture = mixture_of([size, size], [share, 1 - share], seed=seed, num_samples=4 * size)
    which, indices = run_of(mixture, 0, int(2.1 * size / min(share, 1 - share)) // 2)
    return dict(p_values(indices[which == source][:size], size))


@pytest.mark.parametrize("size", [2**14, pytest.param(2**17, marks=pytest.mark.slow)])
def test_the_epochs_of_each_source_look_like_true_shuffles(size):
    found = {
        (name, source, seed): p
        for source in (0, 1)
        for seed in range(2)
        for name, p in p_values_of_a_source(size, 0.3, source, seed).items()
    }
    assert len(found) >= 4 * 15
    assert min(found.items(), key=lambda item: item[1])[1] > 1e-4, found
    assert 0.35 < np.mean(list(found.values())) < 0.65
    assert max(found.values()) < 1 - 1e-4, found


def test_sources_of_one_size_have_orders_of_their_own():
    which, indices = run_of(mixture_of([1000, 1000], [1, 1], num_samples=6000), 0, 6000)
    first, second = (indices[which == source].reshape(3, 1000) for source in (0, 1))
    orders = {tuple(order) for order in [*first, *second]}
    assert len(orders) == 6
    plain = {tuple(IndexShuffle(1000, key)[:]) for key in range(6)}
    assert not orders & plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"shares": {"s0": 1, "web": 2}},
            "order.shares: expected names of the sources 's0', 's1', got 'web'; write the",
        ),
        ({"shares": {"s0": 1}}, "expected a share for each of the sources 's0', 's1', got none for 's1'; give it one"),
        ({"shares": {"s0": 1, "s1": 0}}, r"order.shares\['s1'\]: expected a number above 0, got 0; leave a source out"),
        ({"shares": {"s0": 1, "s1": -2.5}}, r"order.shares\['s1'\]: expected a number above 0, got -2.5"),
        ({"shares": {"s0": 1, "s1": float("nan")}}, "expected a number above 0, got nan"),
        ({"shares": {"s0": 1, "s1": float("inf")}}, "expected a number above 0, got inf"),
        ({"shares": {"s0": 1, "s1": "0.3"}}, "expected a number above 0, got '0.3'"),
        ({"shares": {"s0": 1, "s1": True}}, "expected a number above 0, got True"),
        (
            {"shares": {"s0": 1, "s1": 1e-9}},
            "at least 1/4096 of their sum, got 1e-09 of 1.000000001 for 's1'; give it",
        ),
        ({"shares": {}}, "order.shares: expected a share for at least one of the sources 's0', 's1', got {}"),
        ({"shares": [1, 2, 3]}, r"expected a share for each of the sources 's0', 's1', got \[1, 2, 3\]"),
        ({"shares": 0.5}, "expected a share for each of the sources 's0', 's1', got 0.5"),
        ({"shares": [1, 1], "changes": {0: [1, 2]}}, "order.changes: expected steps of at least 1 as keys, got 0"),
        ({"shares": [1, 1], "changes": [1, 2]}, "order.changes: expected a dict from a step to its shares, got a list"),
        ({"shares": [1, 1], "changes": {5: {"x": 1}}}, r"order.changes\[5\]: expected names of the sources 's0', 's1'"),
        (
            {"shares": [1, 1], "num_samples": 5},
            "order.num_samples: expected at least global_batch_size=6 samples, got 5",
        ),
        (
            {"shares": [1, 1], "num_samples": 1.5},
            "order.num_samples: expected a number of samples in an epoch, at least",
        ),
    ],
)
def test_wrong_shares_are_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as raised:
        Mixture(sources_of(5, 7), 1, BATCH, **options)
    assert "\n" not in str(raised.value)


def test_the_fingerprint_is_that_of_the_whole_plan():
    plans = [
        mixture_of([9, 9], [1, 2]),
        mixture_of([9, 9], [2, 1]),
        mixture_of([9, 8], [1, 2]),
        mixture_of([9, 9], [1, 2], changes={10**6: [1, 1]}),
        mixture_of([9, 9], [1, 2], changes={10**6 + 1: [1, 1]}),
        mixture_of([9, 9], [1, 2], changes={10**6: [1, 3]}),
    ]
    assert len({plan.fingerprint for plan in plans}) == len(plans)
    assert mixture_of([9, 9], [10, 20]).fingerprint == plans[0].fingerprint


def test_wrong_data_is_one_line():
    with pytest.raises(ConfigError, match=r"expected several sources for a Mixture, got train_data of one \(range\)"):
        Mixture(range(10), 1, BATCH, shares=[1])
    with pytest.raises(ConfigError, match="expected sources with samples, got source 1 of train_data empty"):
        Mixture(ConcatDataset([range(3), []]), 1, BATCH, shares=[1, 1])
    with pytest.raises(ConfigError, match="expected names of the sources 0, 1, got 'web'; give a list in their order"):
        Mixture(ConcatDataset([range(3), range(4)]), 1, BATCH, shares={"web": 1})
