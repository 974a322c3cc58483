"""The arithmetic of `all_reduce`: it folds the ranks' values in rank order.

*Contract*: a fold is a pure function of the values by rank, so every rank computes the same bits. Floats narrower than
32 bits are summed and multiplied in float32 and rounded once. NaN wins in min and max.

*Source*: `torch.distributed.all_reduce`, for the shapes and the wrap-around of integers.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor

from disttrain.backend.base import Op
from disttrain.backend.headers import describe_value

OPS: tuple[str, ...] = get_args(Op)

_ON_TENSORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "mean": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
}


def check_reducible(value: object, op: str) -> None:
    """Raise ValueError for an unknown op, TypeError for a value that `all_reduce` does not take."""
    if op not in OPS:
        raise ValueError(f"expected op to be one of {', '.join(OPS)}, got {op!r}")
    if isinstance(value, Tensor):
        check_foldable(value)
        is_bool, ordered = value.dtype == torch.bool, not value.dtype.is_complex
    elif isinstance(value, bool | int | float):
        is_bool, ordered = isinstance(value, bool), True
    else:
        raise TypeError(
            f"all_reduce takes a tensor, a bool, an int or a float, got {describe_value(value)}; use all_gather"
        )
    if is_bool and op not in ("min", "max"):
        raise TypeError(f"all_reduce of bool takes op='min' (all) or 'max' (any), got {op!r}; convert to int to count")
    if not ordered and op in ("min", "max"):
        raise TypeError(f"complex numbers have no order: all_reduce of {describe_value(value)} takes no op={op!r}")


def check_foldable(tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is dense and holds all of its data."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or hasattr(tensor, "to_local"):
        raise TypeError(
            f"collectives take dense tensors, got {type(tensor).__name__} {describe_value(tensor)} of layout "
            f"{tensor.layout} on {tensor.device}; convert it, for instance by to_dense() or to_local()"
        )


def fold_tensors(values: Tensor, op: str) -> Tensor:
    """Reduce `values` of shape [world_size, *S] to shape S."""
    dtype, count = values.dtype, values.shape[0]
    if dtype.is_floating_point and dtype.itemsize < 4:
        return _fold(values.float(), op, count).to(dtype)
    if op == "mean" and not (dtype.is_floating_point or dtype.is_complex):
        return (_fold(values.to(torch.int64), "sum", count) / count).to(torch.get_default_dtype())
    return _fold(values, op, count)


def _fold(values: Tensor, op: str, count: int) -> Tensor:
    folded = functools.reduce(_ON_TENSORS[op], values.unbind())
    if op == "mean":
        return folded / count
    return folded.clone() if count == 1 else folded


def fold_numbers(values: Sequence[bool | int | float], op: str) -> bool | int | float:
    """Reduce numbers of one type: integers exactly, floats as float64 tensors."""
    if isinstance(values[0], float):
        return fold_tensors(torch.tensor(values, dtype=torch.float64), op).item()
    if op in ("min", "max"):
        return min(values) if op == "min" else max(values)
    if op == "product":
        return functools.reduce(operator.mul, values)
    return sum(values) / len(values) if op == "mean" else sum(values)
