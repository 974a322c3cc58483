"""Tensors that are cut over the ranks are assembled on their owners, and sent back in parts, with every bit."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks
from torch import Tensor

from disttrain.backend.base import Backend
from disttrain.parallel.owners import assembled, num_rows, owners_of, spread

SHAPES = [(7, 3), (2, 5), (1,), (12, 2, 2), (5,), (3, 0), (4, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.int64, torch.float32, torch.bfloat16]


@given(st.lists(st.integers(0, 10**6), max_size=40), st.integers(1, 9))
def test_each_rank_owns_as_many_tensors_and_the_largest_are_shared_out(sizes: list[int], world_size: int) -> None:
    owners = owners_of(sizes, world_size)
    counts = [owners.count(rank) for rank in range(world_size)]
    assert len(owners) == len(sizes)
    assert max(counts) - min(counts) <= 1
    loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == r) for r in range(world_size)]
    assert max(loads) - min(loads) <= max(sizes, default=0)


@given(st.integers(0, 50), st.integers(1, 9))
def test_the_rows_of_a_rank_are_those_of_chunk(rows: int, world_size: int) -> None:
    chunks = [len(chunk) for chunk in torch.zeros(rows, 2).chunk(world_size)]
    expected = [*chunks, *[0] * (world_size - len(chunks))]
    assert [num_rows(rows, rank, world_size) for rank in range(world_size)] == expected


def of_all(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]


def there_and_back(backend: Backend) -> tuple[list[int], bool, bool]:
    rank, size, group = backend.rank, backend.world_size, backend.process_group
    assert group is not None
    wholes = of_all(1)
    cuts = [num_rows(len(whole), rank, size) for whole in wholes]
    starts = [sum(num_rows(len(whole), peer, size) for peer in range(rank)) for whole in wholes]
    parts: dict[int, Tensor] = {
        index: whole[start : start + count]
        for index, (whole, start, count) in enumerate(zip(wholes, starts, cuts, strict=True))
    }
    cut: dict[int, Any] = {index: _Cut(wholes[index].shape, part) for index, part in parts.items()}
    owners = dict(enumerate(owners_of([whole.numel() for whole in wholes], size)))
    own = assembled(cut, owners, group)
    right = all(torch.equal(own[index], wholes[index]) for index in own)
    forms = {index: (tuple(whole.shape), whole.dtype) for index, whole in enumerate(wholes)}
    back = spread(own, forms, owners, group, backend.device)
    return sorted(own), right, all(torch.equal(back[index], parts[index]) for index in parts)


class _Cut:
    """The part of a DTensor that `assembled` reads."""

    def __init__(self, shape: torch.Size, part: Tensor) -> None:
        self.shape, self.dtype, self.device, self._part = shape, part.dtype, part.device, part

    def detach(self) -> "_Cut":
        return self

    def to_local(self) -> Tensor:
        return self._part


def test_tensors_of_any_shape_and_dtype_go_to_their_owners_and_back(ranks: Ranks) -> None:
    for world_size in (1, 2, 3):
        found = ranks(world_size, there_and_back)
        assert sorted(index for own, _, _ in found for index in own) == list(range(len(SHAPES)))
        assert all(right and back for _, right, back in found)
