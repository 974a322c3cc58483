"""Fair turns: which of several sources has its turn at each position, so that every source has its share at any time.

*Contract*: with shares that sum to 1, source k has had c of the first t turns, where c differs from t * share by less
than 1, for each source and each t. The turns are a function of the shares, a key and the position. Shares are exact
fractions, and counts are integers of any size: nothing drifts. Any position takes the same time.

The n-th turn of a source (from 0) must not come before position floor(n / share), and must be over at position
ceil((n + 1) / share): otherwise its count would be off by 1 or more. These windows are those of fair scheduling, and
turns that are given to the open window that closes first (EDF) meet all of them. Here the turns are drawn at random
among those that leave the rest possible. Else a source could always have the same places of a global batch, and a slot
always samples of the same source. Turns are computed in blocks, each by itself:

- Shares with a common denominator up to 256 (0.7 and 0.3: 10): a block is one or several periods, and at its ends each
  source has exactly its share. 512 blocks are drawn, when they are first needed; a hash of a block's number chooses.
- Other shares: the counts at the ends of a block are those to which EDF leads from one block earlier. It starts there
  from a state that needs no history: the windows that have closed are over, and so many of the open ones, those that
  close first, that the counts add up. EDF can go on from this state. For take any later t. If a window that was not
  over has closed by t, so have all that were over early, because they close sooner; then no source is ahead of its
  share at t, and the turns that are needed by t are at most those that there are. If none has, only sources that
  were over early need turns by t, and each at most its share of them. So the counts at a block's start can be gone on
  from, and those at its end can be reached. The one restricts the turns of windows that close in the block, the other
  those that open in it; a window that does both is an ordinary one. So the block between them exists.

*Errors*: AssertionError if a block were not possible, which would be a defect here.

*Cost*: some 3 microseconds for each turn of a new block, and 0.2 for each of a known one. Of the first kind at most
512 blocks are computed, of at most 256 turns, and kept. A block of the second kind has 32 turns, or as many as the
smallest share needs to have one; it is always new, and costs 5 microseconds a turn. With a hundred sources both cost
some 25.

*Source*: Baruah, Cohen, Plaxton and Varvel, "Proportionate Progress: A Notion of Fairness in Resource Allocation"
(Algorithmica 1996), for the windows; Tijdeman, "The chairman assignment problem" (1980).
"""

import hashlib
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from disttrain.data.permutation import Indices, split_mix

SHORTEST_BLOCK, SHORTEST_PERIODS = 32, 64
LONGEST_PERIOD = 256
NUM_DRAWN = 512
"""The number of blocks that are drawn for shares with a period."""
SMALLEST_SHARE = Fraction(1, 2**12)


class Block(NamedTuple):
    """The turns of one block: the source of each, and how often that source had its turn in the block before."""

    sources: npt.NDArray[np.int32]
    earlier: npt.NDArray[np.int32]


class Windows(NamedTuple):
    """The windows of one source's turns in a block, from its start: where each opens, and where it has closed."""

    opens: list[int]
    closes: list[int]


class FairTurns:
    """The turns of sources with these `shares`, which sum to 1, each at least `SMALLEST_SHARE`."""

    def __init__(self, shares: Sequence[Fraction], key: int) -> None:
        self._total = math.lcm(*(share.denominator for share in shares))
        self._weights = [int(share * self._total) for share in shares]
        self._key = key
        self._has_period = self._total <= LONGEST_PERIOD
        whole = -(-self._total // min(self._weights))  # each source has a turn
        self._length = max(SHORTEST_BLOCK, whole)
        if self._has_period:
            self._length = self._total * -(-SHORTEST_PERIODS // self._total)
        self._blocks: dict[int, Block] = {}
        self._ends: dict[int, list[int]] = {}

    def counts(self, position: int) -> list[int]:
        """Return the number of turns of each source before `position`."""
        number, place = divmod(position, self._length)
        begun = self._counts_at(number)
        turns = self._block(number).sources[:place] if place else np.empty(0, dtype=np.int32)
        inside = np.bincount(turns, minlength=len(begun)).tolist()
        return [before + added for before, added in zip(begun, inside, strict=True)]

    def at(self, positions: Indices) -> tuple[Indices, Indices]:
        """Return for each position the source that has its turn, and how many turns it had before."""
        sources, earlier = np.empty_like(positions), np.empty_like(positions)
        numbers, places = np.divmod(positions, self._length)
        by_block = np.argsort(numbers, kind="stable")
        found, first = np.unique(numbers[by_block], return_index=True)
        for number, here in zip(found.tolist(), np.split(by_block, first[1:]), strict=True):
            block = self._block(number)
            sources[here] = block.sources[places[here]]
            earlier[here] = block.earlier[places[here]] + np.array(self._counts_at(number))[sources[here]]
        return sources, earlier

    def _counts_at(self, number: int) -> list[int]:
        """Return the number of turns of each source before a block."""
        if self._has_period:
            return [number * (self._length // self._total) * weight for weight in self._weights]
        if number == 0:
            return [0] * len(self._weights)
        if number not in self._ends:
            if len(self._ends) > 8:  # a pass needs the ends of one block; a slice may begin in an earlier one
                self._ends.clear()
            self._ends[number] = self._led_to(number)
        return self._ends[number]

    def _led_to(self, number: int) -> list[int]:
        """Return the counts before a block to which EDF leads from one block earlier."""
        start = (number - 1) * self._length
        done = [start * weight // self._total for weight in self._weights]
        rest = [start * weight % self._total for weight in self._weights]
        until_closed = [Fraction(self._total - r, w) for r, w in zip(rest, self._weights, strict=True)]
        soonest = sorted(range(len(done)), key=lambda k: (until_closed[k], k))
        for k in soonest[: sum(rest) // self._total]:
            done[k] += 1
        ends = [-(-(start + self._length) * weight // self._total) for weight in self._weights]
        windows = self._windows(start, done, ends)
        for source in _first_closing(windows, self._length):
            done[source] += 1
        return done

    def _block(self, number: int) -> Block:
        name = number
        if self._has_period:
            name = int(split_mix(np.array([number], dtype=np.uint64), self._key)[0]) % NUM_DRAWN
        if name not in self._blocks:
            if not self._has_period and len(self._blocks) > 8:
                self._blocks.clear()
            self._blocks[name] = self._drawn(number, name)
        return self._blocks[name]

    def _drawn(self, number: int, name: int) -> Block:
        start, counts, ends = number * self._length, self._counts_at(number), self._counts_at(number + 1)
        windows = self._windows(start, counts, ends)
        closes = [[min(close, self._length) for close in each.closes] for each in windows]
        clipped = [Windows(each.opens, close) for each, close in zip(windows, closes, strict=True)]
        words = hashlib.shake_256(f"FairTurns/{self._key}/{name}".encode()).digest(8 * self._length)
        draws = (np.frombuffer(words, dtype="<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53
        turns = _drawn_turns(clipped, draws.tolist())
        return Block(*np.array(turns, dtype=np.int32).T)

    def _windows(self, start: int, counts: list[int], ends: list[int]) -> list[Windows]:
        """Return the windows of each source's turns from number `counts` to number `ends`."""
        return [
            Windows(
                [max(0, n * self._total // weight - start) for n in range(first, end)],
                [-(-(n + 1) * self._total // weight) - start for n in range(first, end)],
            )
            for weight, first, end in zip(self._weights, counts, ends, strict=True)
        ]


def _first_closing(windows: Sequence[Windows], length: int) -> list[int]:
    """Return the source of each turn, if each turn is given to the open window that closes first."""
    given, turns = [0] * len(windows), []
    waiting = [(each.opens[0], source) for source, each in enumerate(windows) if each.opens]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    for now in range(length):
        while waiting and waiting[0][0] <= now:
            _, source = heapq.heappop(waiting)
            heapq.heappush(ready, (windows[source].closes[given[source]], source))
        _, source = heapq.heappop(ready)
        turns.append(source)
        given[source] += 1
        if given[source] < len(windows[source].opens):
            heapq.heappush(waiting, (windows[source].opens[given[source]], source))
    return turns


def _drawn_turns(windows: Sequence[Windows], draws: Sequence[float]) -> list[tuple[int, int]]:
    """Return (source, turns it had before) of each turn, drawn among the windows that leave the rest possible.

    A window that closes after n turns has this one with a chance of 1/n; the one that closes first has the rest. So the
    turn of a small share may be anywhere in its long window. `slack[t]` is the number of turns before t that need not
    be given to a window that closes by then; where it is 0, the next turn must be given to one of these.
    """
    slack = _slack(windows, len(draws))
    tight = [t for t, left in enumerate(slack) if not left]  # a heap; a slack of 0 stays 0
    given, turns = [0] * len(windows), []
    never = len(draws) + 1
    opens = [each.opens[0] if each.opens else never for each in windows]
    closes = [each.closes[0] if each.closes else never for each in windows]
    for now, draw in enumerate(draws):
        while tight[0] <= now:
            heapq.heappop(tight)
        may = [source for source, opening in enumerate(opens) if opening <= now and closes[source] <= tight[0]]
        source = first = min(may, key=closes.__getitem__)
        left = draw
        for other in may:
            left -= 1 / (closes[other] - now) if other != first else 0
            if left < 0:
                source = other
                break
        for t in range(now + 1, closes[source]):
            slack[t] -= 1
            if slack[t] == 0:
                heapq.heappush(tight, t)
        turns.append((source, given[source]))
        given[source] += 1
        more = given[source] < len(windows[source].opens)
        opens[source] = windows[source].opens[given[source]] if more else never
        closes[source] = windows[source].closes[given[source]] if more else never
    return turns


def _slack(windows: Sequence[Windows], length: int) -> list[int]:
    """Return for each t up to `length` the turns before t that no window needs that closes by then."""
    slack = list(range(length + 1))
    closing = [0] * (length + 1)
    for each in windows:
        for close in each.closes:
            closing[close] += 1
    needed = 0
    for t in range(length + 1):
        needed += closing[t]
        slack[t] -= needed
    assert min(slack) >= 0, "every window has room"
    return slack
