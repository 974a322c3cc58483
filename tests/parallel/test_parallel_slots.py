"""Laws of the slots and their tree, for every number of slots and ranks."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.errors import ConfigError
from disttrain.parallel.slots import (
    Slots,
    TreeSum,
    fold,
    halves,
    mean_over_slots,
    parent,
    path,
    sibling,
    tiles,
)

Expression = int | tuple["Expression", "Expression"]


def pair(left: Expression, right: Expression) -> Expression:
    """An addition that neither commutes nor associates: its result is the expression itself."""
    return (left, right)


def by_one_process(lo: int, hi: int) -> Expression:
    """Return the tree's expression of the slots [lo, hi), by its definition."""
    if hi - lo == 1:
        return lo
    mid = (lo + hi) // 2
    return (by_one_process(lo, mid), by_one_process(mid, hi))


@st.composite
def runs(draw: st.DrawFn) -> Slots:
    """Draw the slots of a run, for one of its ranks."""
    num_slots = draw(st.integers(1, 64))
    world_size = draw(st.integers(1, num_slots))
    return Slots(num_slots, draw(st.integers(0, world_size - 1)), world_size)


@given(runs())
def test_every_slot_has_one_owner_and_ranks_differ_by_at_most_one_slot(run: Slots) -> None:
    assert [s for rank in range(run.world_size) for s in run.of(rank)] == list(range(run.num_slots))
    assert all(slot in run.of(run.owner(slot)) for slot in range(run.num_slots))
    assert run.mine == run.of(run.rank)
    assert run.counts == tuple(map(len, map(run.of, range(run.world_size))))
    assert 1 <= min(run.counts) <= max(run.counts) <= min(run.counts) + 1


@given(runs())
def test_the_nodes_of_a_rank_tile_its_slots_and_are_as_few_as_can_be(run: Slots) -> None:
    nodes = run.nodes(run.rank)
    assert [s for lo, hi in nodes for s in range(lo, hi)] == list(run.mine)
    assert all(list(path(node, run.num_slots))[-1] == node for node in nodes)
    for node in nodes:
        above = parent(node, run.num_slots)
        assert above is None or not (run.mine.start <= above[0] and above[1] <= run.mine.stop)
    assert len(nodes) <= max(1, 2 * math.ceil(math.log2(run.num_slots)))


@given(st.integers(2, 64), st.data())
def test_parent_and_sibling_are_the_halves_of_one_node(num_slots: int, data: st.DataObject) -> None:
    node = (0, num_slots)
    assert parent(node, num_slots) is None
    assert sibling(node, num_slots) is None
    while node[1] - node[0] > 1:
        left, right = halves(node)
        assert parent(left, num_slots) == parent(right, num_slots) == node
        assert (sibling(left, num_slots), sibling(right, num_slots)) == (right, left)
        node = data.draw(st.sampled_from([left, right]))


@given(runs())
def test_ranks_that_sum_their_slots_and_fold_their_nodes_write_the_expression_of_one_process(run: Slots) -> None:
    parts: dict[tuple[int, int], Expression] = {}
    for rank in range(run.world_size):
        tree = TreeSum[Expression](run.num_slots, pair)
        most = 0
        for slot in run.of(rank):
            tree.put((slot, slot + 1), slot)
            most = max(most, len(tree.parts))
        assert sorted(tree.parts) == run.nodes(rank)
        assert most <= max(1, 2 * math.ceil(math.log2(run.num_slots)))
        parts |= tree.parts
    assert run.fold(parts, pair) == by_one_process(0, run.num_slots)


@given(st.integers(1, 64), st.data())
def test_slots_in_any_order_give_the_same_expression(num_slots: int, data: st.DataObject) -> None:
    tree = TreeSum[Expression](num_slots, pair)
    for slot in data.draw(st.permutations(range(num_slots))):
        tree.put((slot, slot + 1), slot)
    assert tree.parts == {(0, num_slots): by_one_process(0, num_slots)}


@given(st.integers(1, 64), st.data())
def test_any_cut_into_nodes_folds_to_the_same_expression(num_slots: int, data: st.DataObject) -> None:
    cuts = [
        0,
        *sorted(data.draw(st.sets(st.integers(1, num_slots - 1)) if num_slots > 1 else st.just(set()))),
        num_slots,
    ]
    nodes = [node for lo, hi in itertools.pairwise(cuts) for node in tiles(lo, hi, num_slots)]
    assert fold({node: by_one_process(*node) for node in nodes}, num_slots, pair) == by_one_process(0, num_slots)


@given(st.integers(1, 64), st.sets(st.tuples(st.integers(-2, 66), st.integers(-2, 66)), max_size=20))
def test_the_nodes_are_those_that_halving_reaches(num_slots: int, nodes: set[tuple[int, int]]) -> None:
    reached = {(0, num_slots)}
    for _ in range(7):
        reached |= {half for node in reached if node[1] - node[0] > 1 for half in halves(node)}
    for node in nodes | reached:
        if node in reached:
            assert list(path(node, num_slots))[-1] == node
        else:
            with pytest.raises(ValueError, match="is no node of the tree"):
                list(path(node, num_slots))


def test_a_fold_names_the_missing_slot() -> None:
    with pytest.raises(ValueError, match="slot 2 is in none of the nodes"):
        fold({(0, 2): 1, (3, 4): 1}, 4, lambda a, b: a + b)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=64))
def test_the_mean_loss_is_near_the_exact_mean(losses: list[float]) -> None:
    assert mean_over_slots(losses) == pytest.approx(math.fsum(losses) / len(losses), abs=1e-8)


def test_the_mean_loss_is_summed_in_slot_order() -> None:
    assert mean_over_slots([1.0, 1e16, -1e16]) == 0.0  # 1e16 absorbs the 1 before it
    assert mean_over_slots([1e16, -1e16, 1.0]) == 1 / 3


@pytest.mark.parametrize(
    ("num_slots", "rank", "world_size", "expected"),
    [
        (2, 0, 3, "use at most 2 ranks, or start a new run with num_slots=3 or more"),
        (0, 0, 1, "expected num_slots >= 1"),
        (4, 2, 2, "0 <= rank < world_size"),
        (4, -1, 2, "0 <= rank < world_size"),
    ],
)
def test_impossible_numbers_are_refused(num_slots: int, rank: int, world_size: int, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Slots(num_slots, rank, world_size)
