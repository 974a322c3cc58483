"""The slots of a run, the rank that owns each, and the binary tree in which their values are summed; pure Python.

*Contract*: a run has `num_slots` = V slots, fixed for its life. Rank r of W runs the slots [V*r//W, V*(r+1)//W),
W <= V. Floating-point addition is not associative, so the grouping is fixed too. Node [lo, hi) of the tree is the sum
of its halves [lo, mid) and [mid, hi), mid = (lo + hi)//2. The root is [0, V). Every sum along this tree has the same
bits, however the slots are spread over ranks.

*Cost*: a rank's range consists of at most 2*log2(V) nodes. A sum over it slot by slot holds at most that many values.

*Source*: the ranges are cut as a segment tree cuts its queries. `TreeSum` is a binary counter that counts slots.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from disttrain.errors import ConfigError

T = TypeVar("T")
Node = tuple[int, int]
"""A node of the tree by the slots below it: (first, one past the last)."""


def halves(node: Node) -> tuple[Node, Node]:
    """Return the two children of a node of at least two slots."""
    lo, hi = node
    mid = (lo + hi) // 2
    return (lo, mid), (mid, hi)


def path(node: Node, num_slots: int) -> Iterator[Node]:
    """Yield the nodes from the root down to `node`; ValueError if the tree has no such node."""
    current: Node = (0, num_slots)
    while current != node:
        yield current
        if current[1] - current[0] < 2:
            raise ValueError(f"{node} is no node of the tree over {num_slots} slots")
        left, right = halves(current)
        current = left if node[0] < left[1] else right
    yield current


def parent(node: Node, num_slots: int) -> Node | None:
    """Return the node that has `node` as one half; None for the root."""
    ancestors = list(path(node, num_slots))[:-1]
    return ancestors[-1] if ancestors else None


def sibling(node: Node, num_slots: int) -> Node | None:
    """Return the other half of the node's parent; None for the root."""
    above = parent(node, num_slots)
    if above is None:
        return None
    left, right = halves(above)
    return right if node == left else left


def tiles(lo: int, hi: int, num_slots: int) -> list[Node]:
    """Return the fewest nodes that together cover the slots [lo, hi), from left to right."""

    def within(node: Node) -> list[Node]:
        if hi <= node[0] or node[1] <= lo:
            return []
        if lo <= node[0] and node[1] <= hi:
            return [node]
        left, right = halves(node)
        return within(left) + within(right)

    return within((0, num_slots))


def fold(parts: Mapping[Node, T], num_slots: int, add: Callable[[T, T], T]) -> T:
    """Return the root's value from the values of nodes that tile it; `add(left, right)` follows the tree's grouping."""
    return _folded((0, num_slots), parts, add)


def _folded(node: Node, parts: Mapping[Node, T], add: Callable[[T, T], T]) -> T:
    # Not a function inside `fold`: an inner function that calls itself is a reference cycle, which keeps the parts
    # alive until the garbage collector runs.
    if node in parts:
        return parts[node]
    if node[1] - node[0] < 2:
        raise ValueError(f"slot {node[0]} is in none of the nodes {sorted(parts)}")
    left, right = halves(node)
    return add(_folded(left, parts, add), _folded(right, parts, add))


def mean_over_slots(losses: Sequence[float], weights: Sequence[int] | None = None) -> float | None:
    """Return the mean of the slots' losses: summed in slot order in float64, divided by their number.

    `losses` has one value for each slot of the run, in slot order. With `weights`, each loss counts as often as its
    weight says, one of weight 0 not at all, and if nothing counts the mean is None. `sum` would round differently from
    Python 3.12 on.
    """
    total, count = 0.0, 0
    for loss, weight in zip(losses, [1] * len(losses) if weights is None else weights, strict=True):
        if weight:
            total += loss * weight
            count += weight
    return total / count if count else None


class TreeSum(Generic[T]):
    """Sums values inside the tree as they arrive; it holds only the nodes that still wait for their sibling.

    `add(left, right)` may reuse either argument, because both are dropped. When all slots of a range have arrived, the
    remaining nodes are that range's `tiles`.
    """

    def __init__(self, num_slots: int, add: Callable[[T, T], T]) -> None:
        self.num_slots = num_slots
        self.parts: dict[Node, T] = {}
        self._add = add

    def put(self, node: Node, value: T) -> None:
        """Add the value of a node. If its sibling has arrived, merge the two, and treat their parent the same way."""
        while (other := sibling(node, self.num_slots)) is not None and other in self.parts:
            waiting = self.parts.pop(other)
            value = self._add(waiting, value) if other < node else self._add(value, waiting)
            node = (min(node[0], other[0]), max(node[1], other[1]))
        self.parts[node] = value


@dataclass(frozen=True)
class Slots:
    """The slots of a run, and the range of slots that this rank runs, `mine`.

    *Contract*: rank r of W runs the slots [V*r//W, V*(r+1)//W) of V. These are plain numbers; no backend is asked for
    them. `num_slots` is fixed for the life of a run; rank and world size are not.
    *Errors*: ConfigError for more ranks than slots, and for impossible numbers.
    """

    num_slots: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.num_slots < 1 or self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ConfigError(
                "expected num_slots >= 1, world_size >= 1 and 0 <= rank < world_size; "
                f"got num_slots={self.num_slots}, world_size={self.world_size}, rank={self.rank}"
            )
        if self.world_size > self.num_slots:
            raise ConfigError(
                f"num_slots={self.num_slots} is too few for {self.world_size} ranks, since each rank needs a slot; "
                f"use at most {self.num_slots} rank{'s' if self.num_slots > 1 else ''}, or start a new run with "
                f"num_slots={self.world_size} or more"
            )

    def of(self, rank: int) -> range:
        """Return the slots of a rank, in the order in which it runs them."""
        return range(self.num_slots * rank // self.world_size, self.num_slots * (rank + 1) // self.world_size)

    @property
    def mine(self) -> range:
        """This rank's slots."""
        return self.of(self.rank)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of slots of each rank, by rank."""
        return tuple(len(self.of(rank)) for rank in range(self.world_size))

    def check_batch(self, batch: Sequence[object]) -> None:
        """Raise ValueError unless `batch` holds one microbatch for each of this rank's slots."""
        if len(batch) != len(self.mine):
            raise ValueError(
                f"expected {len(self.mine)} microbatches, for the slots {self.mine.start} to {self.mine.stop - 1}; "
                f"got {len(batch)}"
            )

    def owner(self, slot: int) -> int:
        """Return the rank that runs a slot."""
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot {slot} is not one of the {self.num_slots} slots")
        return ((slot + 1) * self.world_size - 1) // self.num_slots

    def nodes(self, rank: int) -> list[Node]:
        """Return the nodes of the tree that together cover a rank's slots, from left to right."""
        slots = self.of(rank)
        return tiles(slots.start, slots.stop, self.num_slots)

    def fold(self, parts: Mapping[Node, T], add: Callable[[T, T], T]) -> T:
        """Return the sum over all slots from nodes that tile them, in the tree's grouping."""
        return fold(parts, self.num_slots, add)
