"""The reduction along the tree on real ranks: the bits are those of one process that follows the tree's definition."""

import pytest
import torch
from ranks import Ranks
from torch import Tensor

from disttrain.backend.base import Backend
from disttrain.parallel import Slots, TreeReduce, TreeSum

LARGE = 540_001  # more than `SMALL_MESSAGE_BYTES`: it is sent in chunks, of unequal sizes
CASES = [(num_slots, size) for num_slots in (5, 6, 7, 8, 12) for size in (0, 1, 2, 7, 1000)] + [(6, LARGE), (8, LARGE)]


def values(num_slots: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return one row for each slot, of very different magnitudes, so the bits depend on the order of addition."""
    generator = torch.Generator().manual_seed(num_slots * 1_000_003 + size)
    rows = torch.randn(num_slots, size, generator=generator) * 10 ** torch.linspace(-2, 3, num_slots)[:, None]
    return rows.to(dtype)


def by_one_process(rows: Tensor, lo: int, hi: int) -> Tensor:
    if hi - lo == 1:
        return rows[lo]
    mid = (lo + hi) // 2
    return by_one_process(rows, lo, mid) + by_one_process(rows, mid, hi)


def parts_of(slots: Slots, rows: Tensor) -> dict[tuple[int, int], Tensor]:
    tree = TreeSum[Tensor](slots.num_slots, torch.add)
    for slot in slots.mine:
        tree.put((slot, slot + 1), rows[slot].clone())
    return tree.parts


def means_that_differ(backend: Backend) -> list[tuple[int, int, str]]:
    """Reduce on all ranks; return the cases whose bits differ from those of one process."""
    differ = []
    for num_slots, size in CASES:
        slots = Slots(num_slots, backend.rank, backend.world_size)
        tree = TreeReduce(slots, backend.process_group)
        rows = values(num_slots, size)
        total = by_one_process(rows, 0, num_slots)
        if not torch.equal(tree.reduce(parts_of(slots, rows), divisor=num_slots), total / num_slots):
            differ.append((num_slots, size, "mean"))
        if not torch.equal(tree.reduce(parts_of(slots, rows), out=torch.empty(size)), total):
            differ.append((num_slots, size, "sum"))
    return differ


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_every_rank_gets_the_bits_of_one_process(ranks: Ranks, world_size: int) -> None:
    assert ranks(world_size, means_that_differ) == [[]] * world_size


def parts_that_differ(backend: Backend) -> list[tuple[int, int, torch.dtype]]:
    """Reduce so that each rank keeps its chunk; return the cases whose bits differ from those of one process."""
    differ = []
    for num_slots in (5, 8):
        for width in (0, 3, 1000):
            for dtype in (torch.float32, torch.bfloat16):
                slots = Slots(num_slots, backend.rank, backend.world_size)
                tree = TreeReduce(slots, backend.process_group)
                rows = values(num_slots, width * backend.world_size, dtype).float()
                expected = (by_one_process(rows, 0, num_slots) / num_slots).to(dtype).view(backend.world_size, width)
                out = torch.empty(width, dtype=dtype)
                tree.start_scatter(parts_of(slots, rows), out=out, divisor=num_slots).wait()
                if not torch.equal(out, expected[backend.rank]):
                    differ.append((num_slots, width, dtype))
    return differ


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_rank_gets_its_chunk_in_the_bits_of_one_process(ranks: Ranks, world_size: int) -> None:
    assert ranks(world_size, parts_that_differ) == [[]] * world_size


def test_a_scatter_needs_parts_as_long_as_all_results_together() -> None:
    expected = r"expected the nodes \[\(0, 2\)\] of rank 0, of 1 x 3 elements; got \{\(0, 2\): 4\}"
    with pytest.raises(ValueError, match=expected):
        TreeReduce(Slots(2), None).start_scatter({(0, 2): torch.zeros(4)}, out=torch.zeros(3))


def test_the_values_distinguish_one_order_of_addition_from_another() -> None:
    rows = values(8, 1000)
    by_rank = [sum(rows[8 * r // 3 : 8 * (r + 1) // 3]) for r in range(3)]
    assert not torch.equal(sum(by_rank), by_one_process(rows, 0, 8))
    assert not torch.equal(sum(rows), by_one_process(rows, 0, 8))


def means_by_dtype(backend: Backend, dtype: torch.dtype, size: int) -> Tensor:
    slots = Slots(6, backend.rank, backend.world_size)
    # A rank passes the sum of a node in the dtype in which it was summed.
    rows = values(6, size, dtype)
    wide = rows.float() if dtype.is_floating_point and dtype.itemsize == 2 else rows
    out = torch.empty(size, dtype=dtype)
    return TreeReduce(slots, backend.process_group).reduce(parts_of(slots, wide), out=out, divisor=6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("world_size", [2, 3])
def test_short_floats_are_summed_long_and_rounded_once(ranks: Ranks, world_size: int, dtype: torch.dtype) -> None:
    for size in (10, 2 * LARGE):
        rows = values(6, size, dtype)
        wide = rows.float() if dtype.is_floating_point and dtype.itemsize == 2 else rows
        expected = (by_one_process(wide, 0, 6) / 6).to(dtype)
        for mean in ranks(world_size, means_by_dtype, dtype, size):
            assert mean.dtype == dtype
            assert torch.equal(mean, expected)


def half_precision_mean(backend: Backend) -> Tensor:
    slots = Slots(2, backend.rank, backend.world_size)
    part = torch.full((3,), 6e4, dtype=torch.float16)
    return TreeReduce(slots, backend.process_group).reduce(dict.fromkeys(slots.nodes(slots.rank), part), divisor=2)


def test_a_sum_too_large_for_half_precision_has_its_mean(ranks: Ranks) -> None:
    assert torch.full((2,), 6e4, dtype=torch.float16).sum().isinf()
    for mean in ranks(2, half_precision_mean):
        assert mean.dtype == torch.float16
        assert torch.equal(mean, torch.full((3,), 6e4, dtype=torch.float16))


def reductions_at_once(backend: Backend) -> list[bool]:
    slots = Slots(8, backend.rank, backend.world_size)
    tree = TreeReduce(slots, backend.process_group)
    sizes = (LARGE, 10, LARGE + 9, LARGE)
    reductions = []
    for size in sizes:
        reductions.append(tree.start(parts_of(slots, values(8, size))))
        if len(reductions) > 1:
            reductions[-2].advance()
    got = [reduction.wait() for reduction in reductions]
    return [torch.equal(a, by_one_process(values(8, size), 0, 8)) for a, size in zip(got, sizes, strict=True)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_reductions_at_once_do_not_mix(ranks: Ranks, world_size: int) -> None:
    assert ranks(world_size, reductions_at_once) == [[True] * 4] * world_size


def refusals(backend: Backend) -> list[str]:
    group = backend.process_group
    assert group is not None
    attempts = [
        lambda: TreeReduce(Slots(4, 0, 2), None),
        lambda: TreeReduce(Slots(4, backend.rank, 3), group),
        lambda: TreeReduce(Slots(4, 1 - backend.rank, 2), group),
        lambda: TreeReduce(Slots(4, backend.rank, 2), group).reduce({(0, 4): torch.zeros(3)}),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(ValueError) as caught:
            attempt()
        messages.append(str(caught.value))
    return messages


def test_slots_that_do_not_fit_the_process_group_are_refused(ranks: Ranks) -> None:
    for rank, (no_group, size, swapped, nodes) in enumerate(ranks(2, refusals)):
        assert "world_size=2 needs a process group" in no_group
        assert f"rank {rank} of 3" in size
        assert f"rank {1 - rank} of 2" in swapped
        assert "got [(0, 4)]" in nodes
