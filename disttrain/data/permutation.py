"""A random order of any number of samples. Any slice of it can be computed without the rest.

*Contract*: `IndexShuffle(n, key)` is a permutation of range(n). It is a pure function of n and key, the same on every
platform and with every numpy. Position i holds sample `shuffle[i]`; `position_of` is the inverse. 1 <= n <= 2**48.

- n <= 2**16: each index gets a keyed 64-bit hash, and the indices are sorted by it. The index itself replaces the low
  16 bits of its hash. So no two words are equal, and sorting the words sorts the indices.
- Larger n: a Feistel network of 8 rounds. An index has two halves: a right half of h bits, which are half the bits of
  n - 1, rounded down, and a left half below m = ceil(n / 2**h). The rounds alternate. One adds a hash of the right half
  to the left half, modulo m. The next xors a hash of the left half into the right half. This permutes range(m * 2**h).
  A result outside range(n) goes through the network again until it is inside (cycle walking). The left half counts
  modulo m and not in bits, because then walks are rare at every n: m * 2**h - n < 2**h, about the square root of n.
  With two halves of equally many bits, an index just above a power of four would go through four times on average.

*Errors*: ValueError for n out of bounds, IndexError for a position or an index out of bounds.

*Cost*: about 25 ns for each index in large slices at any n, some 60 microseconds for each call with small ones; memory
for the slice and 0.3 MB. n <= 2**16 is sorted once, in about 1 ms.

*Source*: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), for the network over a product
of two ranges and the walk; Dietzfelbinger et al., "A Reliable Randomized Algorithm for the Closest-Pair Problem"
(1997), for the multiply-shift hash inside a round; Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
Generators" (OOPSLA 2014), for SplitMix64, which hashes the small ranges.
"""

import hashlib
import operator
from collections.abc import Callable, Iterator
from typing import TypeAlias, overload

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.uint64]
Indices: TypeAlias = npt.NDArray[np.int64]
RoundKey: TypeAlias = tuple[Words, Words, Words]
Rounds: TypeAlias = Callable[[Words, Words, Words, Words], None]

LARGEST_SORTED = 2**16
LARGEST = 2**48
NUM_ROUNDS = 8
BLOCK = 8192
"""The number of indices in the network at a time: its five arrays of 64 KiB stay in a core's cache."""


def _word(value: int) -> Words:
    # An array of no dimensions: numpy handles it as an operand much faster than a scalar, and wraps silently.
    return np.array(value % 2**64, dtype=np.uint64)


_ONE, _24, _27, _30, _31, _32, _40 = map(_word, (1, 24, 27, 30, 31, 32, 40))
_GOLDEN = _word(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = _word(0xBF58476D1CE4E5B9), _word(0x94D049BB133111EB)
_INDEX_BITS = _word(LARGEST_SORTED - 1)


def _key_words(n: int, key: int, count: int) -> list[int]:
    """Return `count` independent 64-bit words that depend only on n and key."""
    digest = hashlib.shake_256(f"IndexShuffle/{n}/{key}".encode()).digest(8 * count)
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 8 * count, 8)]


def split_mix(numbers: Words, start: int) -> Words:
    """Return the outputs with these numbers of the SplitMix64 generator that begins at `start`, each by itself."""
    words = numbers * _GOLDEN
    words += _word(start)
    for shift, multiplier in ((_30, _MIX_1), (_27, _MIX_2), (_31, _ONE)):
        words ^= words >> shift
        words *= multiplier
    return words


def _sorted_order(n: int, key: int) -> npt.NDArray[np.uint16]:
    """Return range(n), n <= 2**16, sorted by the SplitMix64 hash of each index; the key gives the hash's start."""
    index = np.arange(n, dtype=np.uint64)
    words = split_mix(index, _key_words(n, key, 1)[0])
    words &= ~_INDEX_BITS
    words |= index
    words.sort()
    return words.astype(np.uint16)  # the low 16 bits: the index


class _Feistel:
    """The network over range(m * 2**h); see the module's docstring."""

    def __init__(self, n: int, key: int) -> None:
        self.half_bits = (n - 1).bit_length() // 2
        self.modulus = -(-n // 2**self.half_bits)
        words = _key_words(n, key, 3 * NUM_ROUNDS)
        self._n = _word(n)
        self._m = _word(self.modulus)
        self._h = _word(self.half_bits)
        self._right_bits = _word(2**self.half_bits - 1)
        self._top_h = _word(64 - self.half_bits)
        self._keys: list[RoundKey] = [
            # Multipliers are odd, because an even one would lose bits of the other factor.
            (_word(words[i] | 1), _word(words[i + 1]), _word(words[i + 2] | 1))
            for i in range(0, 3 * NUM_ROUNDS, 3)
        ]

    def encrypt(self, words: Words) -> None:
        """Replace `words`, an array of words below n, by their images, which are below n too."""
        self._walk(words, self._encrypt_rounds)

    def decrypt(self, words: Words) -> None:
        """Replace `words` by the words of which they are the images."""
        self._walk(words, self._decrypt_rounds)

    def _walk(self, words: Words, rounds: Rounds) -> None:
        self._once(words, rounds)
        outside = np.flatnonzero(words >= self._n)
        while outside.size:
            again = words[outside]
            self._once(again, rounds)
            words[outside] = again
            outside = outside[again >= self._n]

    def _once(self, words: Words, rounds: Rounds) -> None:
        scratch = np.empty((4, min(BLOCK, words.size)), dtype=np.uint64)
        for start in range(0, words.size, BLOCK):
            block = words[start : start + BLOCK]
            left, right, a, b = scratch[:, : block.size]
            np.right_shift(block, self._h, out=left)
            np.bitwise_and(block, self._right_bits, out=right)
            rounds(left, right, a, b)
            np.left_shift(left, self._h, out=left)
            np.bitwise_or(left, right, out=block)

    def _encrypt_rounds(self, left: Words, right: Words, a: Words, b: Words) -> None:
        for i in range(0, NUM_ROUNDS, 2):
            self._hash_below_m(right, self._keys[i], a, b)
            np.add(left, a, out=left)
            # In unsigned words, left - m is huge if left < m. So the smaller of the two is left modulo m.
            np.subtract(left, self._m, out=b)
            np.minimum(left, b, out=left)
            self._hash_to_h_bits(left, self._keys[i + 1], a, b)
            np.bitwise_xor(right, a, out=right)

    def _decrypt_rounds(self, left: Words, right: Words, a: Words, b: Words) -> None:
        for i in range(NUM_ROUNDS - 2, -2, -2):
            self._hash_to_h_bits(left, self._keys[i + 1], a, b)
            np.bitwise_xor(right, a, out=right)
            self._hash_below_m(right, self._keys[i], a, b)
            np.subtract(left, a, out=left)
            np.add(left, self._m, out=b)
            np.minimum(left, b, out=left)

    def _hash_below_m(self, half: Words, key: RoundKey, out: Words, scratch: Words) -> None:
        """Hash `half` to range(m): the top 40 bits of the hash are a fraction of m."""
        _hash(half, key, out, scratch)
        np.right_shift(out, _24, out=out)
        np.multiply(out, self._m, out=out)
        np.right_shift(out, _40, out=out)

    def _hash_to_h_bits(self, half: Words, key: RoundKey, out: Words, scratch: Words) -> None:
        """Hash `half` to h bits, the top ones of the hash."""
        _hash(half, key, out, scratch)
        np.right_shift(out, self._top_h, out=out)


def _hash(half: Words, key: RoundKey, out: Words, scratch: Words) -> None:
    """Hash `half`, of at most 25 bits, by two keyed multiply-shifts; the top 40 bits of `out` depend on all of it."""
    first, addend, second = key
    np.multiply(half, first, out=out)
    np.add(out, addend, out=out)
    np.right_shift(out, _32, out=scratch)
    np.bitwise_xor(out, scratch, out=out)
    np.multiply(out, second, out=out)


class IndexShuffle:
    """The permutation of range(n) that `key`, any integer, selects. A slice costs only its own length.

    *Contract*: a function of n (1 to 2**48) and key only, on every platform. `shuffle[i]` is an int. `shuffle[a:b]`,
    `indices(a, b)` and `at(positions)` are int64 arrays of the positions' shape. `position_of` is the inverse of `at`.
    *Errors*: ValueError for n out of bounds, IndexError for a position or an index outside range(n), TypeError for one
    that is not an integer.
    *Cost*: 25 ns for each index in large slices, some 60 microseconds for each call with small ones, at any n; memory
    for the slice and 0.3 MB. n <= 2**16 is sorted once, in about 1 ms.
    *Source*: a sort by hash up to n = 2**16, a Feistel network above; the module's docstring cites both.
    """

    def __init__(self, n: int, key: int) -> None:
        n, key = operator.index(n), operator.index(key)
        if not 1 <= n <= LARGEST:
            raise ValueError(f"expected a shuffle of 1 to 2**48 indices, got n={n}")
        self.n = n
        self.key = key
        self._sorted = _sorted_order(n, key) if n <= LARGEST_SORTED else None
        self._feistel = _Feistel(n, key) if n > LARGEST_SORTED else None

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        return f"IndexShuffle(n={self.n}, key={self.key})"

    def indices(self, start: int, stop: int) -> Indices:
        """Return the indices at the positions start, start + 1, ..., stop - 1."""
        if not 0 <= start <= stop <= self.n:
            raise IndexError(f"expected 0 <= start <= stop <= {self.n}, got start={start}, stop={stop}")
        return self._at(np.arange(start, stop, dtype=np.uint64))

    def at(self, positions: npt.ArrayLike) -> Indices:
        """Return the indices at `positions`, in any order, of any shape."""
        return self._at(self._checked(positions, "position"))

    def position_of(self, indices: npt.ArrayLike) -> Indices:
        """Return the positions of `indices`: the inverse of `at`."""
        words = self._checked(indices, "index")
        if self._feistel is not None:
            self._feistel.decrypt(words.reshape(-1))
            return words.view(np.int64)
        inverse = np.empty(self.n, dtype=np.int64)
        inverse[self._sorted] = np.arange(self.n)
        return inverse[words]

    @overload
    def __getitem__(self, position: int) -> int: ...
    @overload
    def __getitem__(self, position: slice) -> Indices: ...
    def __getitem__(self, position: int | slice) -> int | Indices:
        if isinstance(position, slice):
            return self.at(np.arange(*position.indices(self.n), dtype=np.int64))
        position = operator.index(position)
        if not -self.n <= position < self.n:
            raise IndexError(f"expected a position from {-self.n} to {self.n - 1}, got {position}")
        return int(self._at(np.array([position % self.n], dtype=np.uint64))[0])

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.n, BLOCK):
            yield from self.indices(start, min(start + BLOCK, self.n)).tolist()

    def _at(self, words: Words) -> Indices:
        """Return the indices at the positions `words`; the result may reuse the memory of `words`."""
        if self._sorted is not None:
            return self._sorted[words].astype(np.int64)
        assert self._feistel is not None
        self._feistel.encrypt(words.reshape(-1))
        return words.view(np.int64)

    def _checked(self, values: npt.ArrayLike, noun: str) -> Words:
        """Return a copy of `values`, which must all lie in range(n)."""
        array = np.asarray(values)
        if array.size == 0:
            return np.empty(array.shape, dtype=np.uint64)
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"expected each {noun} to be an integer, got an array of {array.dtype}")
        low, high = array.min(), array.max()
        if low < 0 or high >= self.n:
            raise IndexError(f"expected each {noun} in range({self.n}), got {low if low < 0 else high}")
        return np.array(array, dtype=np.uint64, order="C")
