"""An order that puts samples of about the same length into one global batch, so that padding is short."""

import hashlib
from typing import Any

import numpy as np

from disttrain.data.order import count, per_sample
from disttrain.data.permutation import IndexShuffle, Indices, split_mix
from disttrain.seeding import seed_for


class LengthBuckets:
    """Each epoch is a permutation of the samples in which those of a global batch have about the same length.

    `lengths`: a number for each sample, or a function of the data that returns them. `window`: the number of global
    batches whose samples are sorted together. A larger window means less padding, and batches that are less random.

    *Contract*: the samples are shuffled, and the order is cut into windows of `window` global batches. The samples of
    a window are sorted by length and cut into global batches. These are shuffled, and half of them are reversed, so
    that no slot always has the shortest samples. A slot is a part of a sorted batch. The samples at the end that fill
    no global batch are not sorted: they are left out at random, whatever their length.
    *Errors*: ConfigError for lengths that do not fit the data, and for a window below 1.
    *Cost*: 8 bytes for each sample; each window is sorted when its first position is asked for, some 100 ns for each of
    its samples.
    """

    def __init__(self, data: Any, seed: int, global_batch_size: int, *, lengths: Any, window: int = 100) -> None:
        self._lengths = per_sample("lengths", lengths, data)
        self._seed = seed
        self._batch = global_batch_size
        self._window = count("window", window, "global batches") * global_batch_size
        self._num_sorted = len(self._lengths) // global_batch_size * global_batch_size
        self._recent: dict[tuple[int, int], Indices] = {}
        self.fingerprint = hashlib.blake2b(self._lengths.tobytes(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        return len(self._lengths)

    def at(self, epoch: int, positions: Indices) -> Indices:
        """Return the indices at `positions` of this epoch's permutation."""
        result = np.empty_like(positions)
        windows = np.where(positions < self._num_sorted, positions // self._window, -1)
        for window in np.unique(windows).tolist():
            here = windows == window
            if window < 0:
                result[here] = self._shuffled(epoch).at(positions[here])
            else:
                result[here] = self._sorted(epoch, window)[positions[here] - window * self._window]
        return result

    def _shuffled(self, epoch: int) -> IndexShuffle:
        return IndexShuffle(len(self._lengths), seed_for(self._seed, "order", epoch))

    def _sorted(self, epoch: int, window: int) -> Indices:
        """Return the indices of one window: its batches, each sorted, in their random order."""
        if (epoch, window) not in self._recent:
            if len(self._recent) > 1:  # one for the next steps, one for those that the ledger describes
                self._recent.pop(next(iter(self._recent)))
            first = window * self._window
            indices = self._shuffled(epoch).indices(first, min(first + self._window, self._num_sorted))
            indices = indices[np.argsort(self._lengths[indices], kind="stable")]
            key = seed_for(self._seed, "window", epoch, window)
            batches = indices.reshape(-1, self._batch)[IndexShuffle(len(indices) // self._batch, key)[:]]
            reverse = split_mix(np.arange(len(batches), dtype=np.uint64), key) >> np.uint64(63) == 1
            batches[reverse] = batches[reverse, ::-1]
            self._recent[epoch, window] = batches.reshape(-1)
        return self._recent[epoch, window]
