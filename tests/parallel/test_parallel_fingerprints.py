"""Numbers that tell whether a tensor has changed: none of the ways to change one is missed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from disttrain.parallel.fingerprints import fetched, fingerprint_by_place, fingerprints, fingerprints_by_place, versions


def by_data(tensor: Tensor) -> None:
    tensor.data[1] = 5.0


def in_place(tensor: Tensor) -> None:
    tensor[1] = 5.0


def not_at_all(tensor: Tensor) -> None:
    tensor.clone()[1] = 5.0


@pytest.mark.parametrize(
    ("change", "has_new_version", "has_new_fingerprint"),
    [(in_place, True, True), (by_data, False, True), (not_at_all, False, False)],
)
def test_a_change_gives_other_numbers(
    change: Callable[[Tensor], Any], has_new_version: bool, has_new_fingerprint: bool
) -> None:
    tensors = {"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.float64), "c": torch.ones(3, dtype=torch.bool)}
    before = versions(tensors.items()), fingerprints(tensors.items())
    change(tensors["a"])
    after = versions(tensors.items()), fingerprints(tensors.items())
    assert (after[0]["a"] != before[0]["a"]) == has_new_version
    assert (after[1]["a"] != before[1]["a"]) == has_new_fingerprint
    assert [numbers["b"] for numbers in after] == [numbers["b"] for numbers in before]


def test_another_tensor_with_the_same_values_gives_other_numbers() -> None:
    first, second = torch.ones(2), torch.ones(2)
    assert versions([("a", first)]) != versions([("a", second)])
    assert fingerprints([("a", first)]) != fingerprints([("a", second)])


def test_numbers_are_fetched_in_their_order() -> None:
    assert fetched([torch.tensor(3), torch.tensor(-1), torch.tensor(2**62)]) == [3, -1, 2**62]
    assert fetched([]) == []


@given(st.integers(0, 2**20), st.integers(1, 3))
def test_two_changed_words_never_cancel_out(start: int, distance: int) -> None:
    """A plain sum would not see that one word has grown by what another has lost."""
    before = torch.zeros(2**20 + 4, dtype=torch.int32)
    after = before.clone()
    after[start], after[start + distance] = 1, -1
    assert int(fingerprint_by_place(before)) != int(fingerprint_by_place(after))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.float64])
def test_fingerprints_differ_if_any_bit_does(dtype: torch.dtype) -> None:
    gradient = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    swapped = gradient.flip(0)
    negated = gradient.clone()
    negated[4, 2] = -negated[4, 2]
    zero, other_zero = torch.zeros(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    other_zero[1] = -other_zero[1] if dtype.is_complex else -0.0
    different = [gradient, swapped, negated, zero, other_zero, None, gradient.t()]
    found = fingerprints_by_place(different)
    assert len(set(found)) == len(different)
    assert fingerprints_by_place([None if each is None else each.clone() for each in different]) == found
    assert fingerprints_by_place([gradient.t().contiguous()]) == [found[-1]]
