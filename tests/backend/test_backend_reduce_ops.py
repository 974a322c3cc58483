"""The arithmetic of all_reduce: one order, one rounding, and torch's own results for integers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disttrain.backend.reduce_ops import OPS, check_reducible, fold_numbers, fold_tensors

floats = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(floats, min_size=1, max_size=9))
def test_a_sum_is_added_in_rank_order(values: list[float]) -> None:
    total = torch.tensor(values[0])
    for value in values[1:]:
        total = total + torch.tensor(value)
    assert torch.equal(fold_tensors(torch.tensor(values), "sum"), total)


@given(st.lists(floats.filter(lambda v: abs(v) < 1e4), min_size=1, max_size=9))
def test_narrow_floats_are_rounded_once(values: list[float]) -> None:
    narrow = torch.tensor(values).half()
    expected = fold_tensors(narrow.float(), "sum").half()
    assert torch.equal(fold_tensors(narrow, "sum"), expected)


@given(st.lists(st.integers(-(10**30), 10**30), min_size=1, max_size=9))
def test_integers_are_exact(values: list[int]) -> None:
    assert fold_numbers(values, "sum") == sum(values)
    assert fold_numbers(values, "product") == math.prod(values)
    assert fold_numbers(values, "min") == min(values)
    assert fold_numbers(values, "max") == max(values)
    assert fold_numbers(values, "mean") == sum(values) / len(values)


@given(st.lists(st.integers(-128, 127), min_size=1, max_size=9))
def test_integer_tensors_wrap_around_and_their_means_do_not(values: list[int]) -> None:
    bytes_ = torch.tensor(values, dtype=torch.int8)
    assert fold_tensors(bytes_, "sum").item() == (sum(values) + 128) % 256 - 128
    assert fold_tensors(bytes_, "mean").item() == pytest.approx(sum(values) / len(values), rel=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_nan_is_never_lost(op: str) -> None:
    for position in range(3):
        values = [1.0, 2.0, 3.0]
        values[position] = math.nan
        assert math.isnan(fold_numbers(values, op))
        assert torch.isnan(fold_tensors(torch.tensor(values), op))


@pytest.mark.parametrize("op", OPS)
def test_folding_one_rank_is_a_copy(op: str) -> None:
    values = torch.tensor([[1.0, 2.0]])
    folded = fold_tensors(values, op)
    assert torch.equal(folded, values[0])
    assert folded.data_ptr() != values.data_ptr()


def test_a_refused_value_is_told_the_alternatives() -> None:
    with pytest.raises(ValueError, match="one of sum, mean, min, max, product, got 'avg'"):
        check_reducible(1, "avg")
    with pytest.raises(TypeError, match="got str; use all_gather"):
        check_reducible("text", "sum")
    with pytest.raises(TypeError, match=r"'min' \(all\) or 'max' \(any\), got 'sum'; convert to int to count"):
        check_reducible(True, "sum")
    with pytest.raises(TypeError, match="dense tensors, got Tensor"):
        check_reducible(torch.eye(2).to_sparse(), "sum")
