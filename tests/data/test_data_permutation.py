"""IndexShuffle against its documented algorithm in plain integers, and statistics against a true shuffle."""

import hashlib
import math
import tracemalloc

import numpy as np
import pytest
from order_statistics import buckets, chi_square, p_values

from disttrain.data import IndexShuffle, permutation

WORD = 2**64
SIZES = [1, 2, 3, 1000, 2**16 - 1, 2**16, 2**16 + 1, 2**16 + 300, 10**6 + 3, 10**9, 2**40, 10**12, 2**48]


def key_words(n, key, count):
    digest = hashlib.shake_256(f"IndexShuffle/{n}/{key}".encode()).digest(8 * count)
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(count)]


def sorted_order(n, key):
    """Return the order for small n as the module's docstring describes it, computed index by index."""
    (start,) = key_words(n, key, 1)

    def split_mix(i):
        z = (start + i * 0x9E3779B97F4A7C15) % WORD
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ z >> 27) * 0x94D049BB133111EB % WORD
        return z ^ z >> 31

    return sorted(range(n), key=lambda i: (split_mix(i) >> 16, i))


def feistel(n, key, position):
    """Return the index at a position for large n, as the module's docstring describes it."""
    h = (n - 1).bit_length() // 2
    m = math.ceil(n / 2**h)
    words = key_words(n, key, 24)

    def hashed(half, i):
        z = (half * (words[3 * i] | 1) + words[3 * i + 1]) % WORD
        return (z ^ z >> 32) * (words[3 * i + 2] | 1) % WORD

    index = position
    while True:
        left, right = divmod(index, 2**h)
        for i in range(0, 8, 2):
            left = (left + ((hashed(right, i) >> 24) * m >> 40)) % m
            right ^= hashed(left, i + 1) >> 64 - h
        index = left * 2**h + right
        if index < n:
            return index


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 4097])
@pytest.mark.parametrize("key", [0, -3, 2**63 - 1])
def test_small_orders_are_the_documented_sort(n, key):
    assert IndexShuffle(n, key).indices(0, n).tolist() == sorted_order(n, key)


@pytest.mark.parametrize("n", [size for size in SIZES if size > 2**16])
def test_large_orders_are_the_documented_network(n):
    positions = [0, 1, 2, 12345, n // 3, n // 2, n - 2, n - 1]
    for key in (0, 2**62 + 1):
        assert IndexShuffle(n, key).at(positions).tolist() == [feistel(n, key, p) for p in positions]


@pytest.mark.parametrize("n", [2**16, 2**16 + 1, 2**16 + 255, 2**17, 2**18 + 1])
def test_whole_orders_hold_every_index_once(n):
    order = IndexShuffle(n, 5).indices(0, n)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("n", SIZES)
def test_the_forms_of_asking_agree(n):
    order = IndexShuffle(n, 9)
    size = min(n, 20_000)
    block = order.indices(n - size, n)
    assert np.array_equal(order[n - size : n], block)
    assert np.array_equal(order[n - size :: 3], block[::3])
    assert np.array_equal(order[: n - size - 1 if n > size else None : -1], block[::-1])
    assert order[n - 1] == order[-1] == block[-1]
    assert type(order[0]) is int
    assert np.array_equal(order.position_of(block), np.arange(n - size, n))
    assert len(order) == n


def test_iterating_gives_the_whole_order():
    assert list(IndexShuffle(70_000, 1)) == IndexShuffle(70_000, 1).indices(0, 70_000).tolist()


def test_keys_and_sizes_give_orders_of_their_own():
    orders = [tuple(IndexShuffle(n, key).indices(0, 50)) for n in (100, 10**6, 10**6 + 1) for key in range(50)]
    assert len(set(orders)) == len(orders)


def test_asking_changes_neither_the_question_nor_the_global_generators():
    positions, before = np.arange(100, dtype=np.uint64), np.random.get_state()[1].copy()
    for n in (1000, 10**9):
        order = IndexShuffle(n, 0)
        order.at(positions)
        order.position_of(positions)
    assert np.array_equal(positions, np.arange(100))
    assert np.array_equal(np.random.get_state()[1], before)


def test_a_slice_of_a_huge_order_takes_little_memory():
    tracemalloc.start()
    try:
        IndexShuffle(10**12, 3).indices(10**12 - 256, 10**12)
        assert tracemalloc.get_traced_memory()[1] < 100_000
        tracemalloc.reset_peak()
        IndexShuffle(10**12, 3).indices(10**12 - 65_536, 10**12)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("n", [0, -1, 2**48 + 1])
def test_sizes_out_of_bounds_are_refused(n):
    with pytest.raises(ValueError, match=f"1 to 2\\*\\*48 indices, got n={n}"):
        IndexShuffle(n, 0)


@pytest.mark.parametrize("n", [100, 10**6])
def test_positions_out_of_bounds_are_refused(n):
    order = IndexShuffle(n, 0)
    for ask in (
        lambda: order[n],
        lambda: order[-n - 1],
        lambda: order.at([0, n]),
        lambda: order.at([-1]),
        lambda: order.position_of([n]),
        lambda: order.indices(5, 4),
        lambda: order.indices(0, n + 1),
        lambda: order.indices(-1, 1),
    ):
        with pytest.raises(IndexError):
            ask()
    with pytest.raises(TypeError, match="expected each position to be an integer, got an array of float64"):
        order.at([0.5])
    assert order.at([]).tolist() == order[5:5].tolist() == []


# Statistics. The keys are fixed, so the results are too. The tests compute some 600 p-values; the smallest of them
# should be about 1/600.


def p_values_of(n, key):
    """Yield (name, p-value) of one order: of the whole order up to 2**17 indices, else of 2**17 indices in it."""
    size = min(n, 2**17)
    start = 0 if size == n else key * 7919 * 2**20 % (n - size)
    return p_values(IndexShuffle(n, key).indices(start, start + size), n, start)


@pytest.mark.parametrize("n", [2**14, 50_000, 2**16, 2**16 + 1, 2**16 + 300, 2**17, 10**9, 10**12, 2**48])
def test_orders_look_like_true_shuffles(n):
    found = {(name, key): p for key in range(4) for name, p in p_values_of(n, key)}
    assert len(found) >= 4 * 15
    assert min(found.items(), key=lambda item: item[1])[1] > 1e-4, found
    # An order that is too even is as wrong as one that is too uneven.
    assert 0.35 < np.mean(list(found.values())) < 0.65
    assert max(found.values()) < 1 - 1e-4, found


@pytest.mark.parametrize("n", [2**16 + 1, 2**17])
def test_the_statistics_find_a_network_of_too_few_rounds(n, monkeypatch):
    monkeypatch.setattr(permutation, "NUM_ROUNDS", 4)
    assert min(p for key in range(4) for _, p in p_values_of(n, key)) < 1e-12


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_few_indices_are_equally_likely(n):
    orders, counts = np.unique([IndexShuffle(n, key).indices(0, n) for key in range(6000)], axis=0, return_counts=True)
    assert len(orders) == math.factorial(n)
    assert chi_square(counts) > 1e-3


@pytest.mark.parametrize("n", [1000, 2**16 + 1, 10**9])
def test_consecutive_keys_give_unrelated_orders(n):
    orders = np.stack([IndexShuffle(n, key).indices(0, 1000) for key in range(65)])
    gaps = (orders[1:] - orders[:-1]) % n
    assert chi_square(np.bincount(buckets(gaps.ravel(), n, 100), minlength=100)) > 1e-3
