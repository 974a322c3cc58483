"""An order that mixes several sources, each with its share of the samples and with epochs of its own."""

import hashlib
import numbers
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch.utils.data import ConcatDataset

from disttrain.data.fair_turns import SMALLEST_SHARE, FairTurns
from disttrain.data.order import count
from disttrain.data.permutation import IndexShuffle, Indices
from disttrain.errors import ConfigError
from disttrain.seeding import seed_for

Shares: TypeAlias = Mapping[str, Any] | Sequence[Any]
"""The share of each source, by its name; or in the order of the sources, if they have no names."""


class _Stage(NamedTuple):
    """The shares that hold from a position on: the sources that have one, and the turns of each source before."""

    first: int
    sources: Indices
    shares: list[Fraction]
    turns: FairTurns
    before: Indices


class Mixture:
    """Samples of several sources. Each source has its share of any first steps, exact to one sample.

    The data is a dict of datasets (`train_data=lambda: {"web": ..., "code": ...}`) or a ConcatDataset, whose sources
    have no names. `shares`: a number for each source, {"web": 0.7, "code": 0.3}, or in order [0.7, 0.3]. They need no
    sum of 1. `changes`: other shares from a step of the run on, {10_000: {"code": 1}}; a source without a share there
    gives no samples. `num_samples`: the positions in an epoch of the run, rounded down to whole steps, by default as
    many as the sources have samples. No position is left out.

    *Contract*: positions count through all epochs. Of the first t positions, source k gives t * share, and less than
    one sample more or less, for each k and each t; after a change of the shares, counted from there (data/
    fair_turns.py). A share is the decimal number that you write: 0.1 is a tenth. The n-th sample of a source of size m
    is entry n % m of the permutation of its own epoch n // m: it comes again after all others of its source have come,
    whatever the shares are.
    *Errors*: ConfigError for names that are no source's, and for shares that are missing, not above 0, or below
    1/4096 of their sum.
    *Cost*: any position of any epoch costs the same: see `FairTurns` and `IndexShuffle`.
    """

    def __init__(
        self,
        data: Any,
        seed: int,
        global_batch_size: int,
        *,
        shares: Shares,
        changes: Mapping[int, Shares] | None = None,
        num_samples: int | None = None,
    ) -> None:
        if not isinstance(data, ConcatDataset):
            raise ConfigError(
                "order: expected several sources for a Mixture, got train_data of one "
                f"({type(data).__name__}); return a dict of datasets there, such as {{'web': ..., 'code': ...}}"
            )
        self._names: tuple[str, ...] | None = getattr(data, "names", None)
        ends = np.array(data.cumulative_sizes)
        self._sizes = np.diff(ends, prepend=0)
        self._offsets = ends - self._sizes
        if not self._sizes.all():
            empty = int(np.flatnonzero(self._sizes == 0)[0])
            raise ConfigError(
                f"order: expected sources with samples, got source {self._shown(empty)} of train_data empty"
            )
        self._seed = seed
        self._length = _epoch_of(len(data), num_samples, global_batch_size)
        self._stages: list[_Stage] = []
        given = [self._by_source("shares", shares)]
        firsts = [0]
        for step in sorted(_steps(changes)):
            firsts.append(step * global_batch_size)
            given.append(self._by_source(f"changes[{step}]", (changes or {})[step]))
        self._check_all_named(given)
        for first, stage_shares in zip(firsts, given, strict=True):
            self._add_stage(first, stage_shares)
        self._latest: dict[int, tuple[int, IndexShuffle]] = {}

    def __len__(self) -> int:
        return self._length

    def sources_of(self, indices: Sequence[int]) -> list[str]:
        """Return the name of the source of each sample; its number if the sources have no names."""
        places = np.searchsorted(self._offsets, np.asarray(indices), side="right") - 1
        return [str(place) if self._names is None else self._names[place] for place in places.tolist()]

    def at(self, epoch: int, positions: Indices) -> Indices:
        """Return the indices at `positions`, of the sources one after the other."""
        sources, numbers_of = self._turns(positions + epoch * self._length)
        own_epochs, places = np.divmod(numbers_of, self._sizes[sources])
        result = np.empty_like(positions)
        for source in np.unique(sources).tolist():
            of_source = np.flatnonzero(sources == source)
            for own_epoch in np.unique(own_epochs[of_source]).tolist():
                here = of_source[own_epochs[of_source] == own_epoch]
                result[here] = self._permutation(source, own_epoch).at(places[here]) + self._offsets[source]
        return result

    @property
    def fingerprint(self) -> str:
        """The sources and the whole plan of their shares, hashed: a resumed run must have the same."""
        stages = [(each.first, each.sources.tolist(), [str(share) for share in each.shares]) for each in self._stages]
        text = repr((self._names, self._sizes.tolist(), stages))
        return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()

    def counts(self, position: int) -> list[int]:
        """Return the number of samples that each source has given before a position, counted through all epochs."""
        return list(map(int, self._counts(self._stages, position)))

    @staticmethod
    def _counts(stages: Sequence[_Stage], position: int) -> Indices:
        stage = stages[bisect_right([each.first for each in stages], position) - 1]
        totals = stage.before.copy()
        totals[stage.sources] += np.array(stage.turns.counts(position - stage.first))
        return totals

    def _turns(self, positions: Indices) -> tuple[Indices, Indices]:
        """Return the source at each position, and how many samples it has given before."""
        sources, earlier = np.empty_like(positions), np.empty_like(positions)
        stages = np.searchsorted([each.first for each in self._stages], positions, side="right") - 1
        for number in np.unique(stages).tolist():
            here, stage = stages == number, self._stages[number]
            turns, before = stage.turns.at(positions[here] - stage.first)
            sources[here] = stage.sources[turns]
            earlier[here] = before + stage.before[sources[here]]
        return sources, earlier

    def _permutation(self, source: int, epoch: int) -> IndexShuffle:
        if source not in self._latest or self._latest[source][0] != epoch:
            key = seed_for(self._seed, "source", source, epoch)
            self._latest[source] = epoch, IndexShuffle(int(self._sizes[source]), key)
        return self._latest[source][1]

    def _add_stage(self, first: int, shares: Mapping[int, Fraction]) -> None:
        total = sum(shares.values())
        parts = [share / total for share in shares.values()]
        turns = FairTurns(parts, seed_for(self._seed, "mixture", len(self._stages)))
        before = self._counts(self._stages, first) if self._stages else np.zeros_like(self._sizes)
        self._stages.append(_Stage(first, np.array(list(shares)), parts, turns, before))

    def _by_source(self, field: str, shares: Shares) -> dict[int, Fraction]:
        """Return the shares by the number of their source, checked."""
        names = self._names
        known = range(len(self._sizes)) if names is None else names
        if not isinstance(shares, Mapping):
            if isinstance(shares, str) or not isinstance(shares, Sequence) or len(shares) != len(known):
                raise ConfigError(f"order.{field}: expected a share for each of {self._all_shown()}, got {shares!r}")
            shares = dict(zip(known, shares, strict=True))  # type: ignore[arg-type]
        elif not shares:
            raise ConfigError(f"order.{field}: expected a share for at least one of {self._all_shown()}, got {{}}")
        elif unknown := [name for name in shares if name not in known]:
            advice = "write the names as train_data does"
            if names is None:
                advice = "give a list in their order, or let train_data return a dict of datasets"
            raise ConfigError(f"order.{field}: expected names of {self._all_shown()}, got {unknown[0]!r}; {advice}")
        by_source = {
            (known.index(name)): _fraction(f"{field}[{name!r}]", share)  # type: ignore[arg-type]
            for name, share in shares.items()
        }
        smallest = min(by_source, key=lambda source: by_source[source])
        if by_source[smallest] < SMALLEST_SHARE * sum(by_source.values()):
            raise ConfigError(
                f"order.{field}: expected each share to be at least 1/{SMALLEST_SHARE.denominator} of their sum, got "
                f"{float(by_source[smallest])} of {float(sum(by_source.values()))} for {self._shown(smallest)}; "
                "give it more, or leave it out"
            )
        return dict(sorted(by_source.items()))

    def _check_all_named(self, given: Sequence[Mapping[int, Fraction]]) -> None:
        """Raise ConfigError for a source that never has a share: its name may have been forgotten."""
        named = {source for shares in given for source in shares}
        if left := [source for source in range(len(self._sizes)) if source not in named]:
            raise ConfigError(
                f"order.shares: expected a share for each of {self._all_shown()}, got none for {self._shown(left[0])}; "
                "give it one, there or in `changes`, or leave it out of train_data"
            )

    def _shown(self, source: int) -> str:
        return str(source) if self._names is None else repr(self._names[source])

    def _all_shown(self) -> str:
        shown = [self._shown(source) for source in range(len(self._sizes))]
        return f"the sources {', '.join(shown[:8])}{', ...' if len(shown) > 8 else ''}"


def _epoch_of(num_data: int, num_samples: int | None, batch: int) -> int:
    """Return the positions in an epoch of the run: whole steps."""
    if num_samples is None:
        return max(1, num_data // batch) * batch
    length = count("num_samples", num_samples, "samples in an epoch")
    if length < batch:
        raise ConfigError(f"order.num_samples: expected at least global_batch_size={batch} samples, got {length}")
    return length // batch * batch


def _steps(changes: Any) -> list[int]:
    """Return the steps at which shares change, checked."""
    if changes is None:
        return []
    if not isinstance(changes, Mapping):
        raise ConfigError(f"order.changes: expected a dict from a step to its shares, got a {type(changes).__name__}")
    for step in changes:
        if isinstance(step, bool) or not isinstance(step, int) or step < 1:
            raise ConfigError(f"order.changes: expected steps of at least 1 as keys, got {step!r}")
    return list(changes)


def _fraction(field: str, share: Any) -> Fraction:
    """Return a share as the number that a person has written: 0.1 is 1/10."""
    is_number = isinstance(share, numbers.Real) and not isinstance(share, bool)
    if not is_number or not 0 < float(share) < float("inf"):
        advice = "; leave a source out that is to give nothing" if is_number and share == 0 else ""
        raise ConfigError(f"order.{field}: expected a number above 0, got {share!r}{advice}")
    if isinstance(share, numbers.Rational):
        return Fraction(int(share.numerator), int(share.denominator))
    return Fraction(str(share))
