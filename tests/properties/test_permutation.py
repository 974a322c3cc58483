"""Laws of IndexShuffle: a bijection of range(n) for every n, the same by every way of indexing."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.data import IndexShuffle
from disttrain.data.permutation import LARGEST, LARGEST_SORTED

large = st.integers(LARGEST_SORTED + 1, LARGEST) | st.sampled_from(
    [2**e + d for e in range(17, 48) for d in (-1, 0, 1)]
)
keys = st.integers(-(2**70), 2**70)


def test_every_size_up_to_2000_is_a_bijection():
    for n in range(1, 2001):
        assert np.array_equal(np.sort(IndexShuffle(n, n).indices(0, n)), np.arange(n))


@settings(deadline=None)
@given(large, keys, st.data())
def test_large_orders_are_bijections_by_their_inverse(n, key, data):
    order = IndexShuffle(n, key)
    some = data.draw(st.lists(st.integers(0, n - 1), max_size=50))
    there = order.at(some)
    assert all(0 <= index < n for index in there)
    assert order.position_of(there).tolist() == some
    assert order.at(order.position_of(some)).tolist() == some


@settings(deadline=None)
@given(st.integers(1, 3000) | large, keys, st.data())
def test_a_slice_is_what_its_positions_are(n, key, data):
    order = IndexShuffle(n, key)
    start = data.draw(st.integers(0, n))
    stop = min(n, start + data.draw(st.integers(0, 300)))
    part = order.indices(start, stop)
    assert part.tolist() == order[start:stop].tolist() == order.at(range(start, stop)).tolist()
    assert len(set(part.tolist())) == stop - start
    if stop > start:
        middle = (start + stop) // 2
        assert order[middle] == part[middle - start]
        assert np.array_equal(np.concatenate([order.indices(start, middle), order.indices(middle, stop)]), part)


@settings(deadline=None)
@given(st.integers(1, LARGEST), keys)
def test_an_order_is_a_function_of_size_and_key(n, key):
    assert np.array_equal(IndexShuffle(n, key)[: min(n, 20)], IndexShuffle(n, key)[: min(n, 20)])
