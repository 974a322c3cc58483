"""The layout of whole parameters: the norm and the clipping are torch's, and nothing is cut or gathered."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from disttrain.parallel import ReplicatedLayout, total_norm
from disttrain.parallel.layout import norm_of_norms


def tensors(sizes: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6))
def test_the_norm_has_the_bits_of_torchs(sizes: list[int]) -> None:
    gradients = tensors(sizes)
    expected = torch.nn.utils.get_total_norm(gradients)
    assert torch.equal(total_norm(gradients), expected)
    assert torch.equal(norm_of_norms([torch.linalg.vector_norm(gradient) for gradient in gradients]), expected)


def test_gradients_of_several_dtypes_have_one_norm() -> None:
    mixed = [*tensors([7]), *tensors([5], torch.float64)]
    expected = torch.linalg.vector_norm(torch.cat([gradient.double() for gradient in mixed]))
    assert total_norm(mixed).dtype == torch.float64
    assert total_norm(mixed).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_is_torchs(limit: float) -> None:
    ours, theirs = ([nn.Parameter(tensor) for tensor in tensors([4, 9])] for _ in range(2))
    for parameters in (ours, theirs):
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
    layout = ReplicatedLayout()
    layout.clip(ours, limit, layout.total_norm([p.grad for p in ours if p.grad is not None]))
    nn.utils.clip_grad_norm_(theirs, limit)
    for our, their in zip(ours, theirs, strict=True):
        assert our.grad is not None
        assert their.grad is not None
        assert torch.equal(our.grad, their.grad)


def test_whole_parameters_need_no_change() -> None:
    layout, model = ReplicatedLayout(), nn.Linear(2, 2)
    optimizer, batch = torch.optim.SGD(model.parameters(), lr=0.1), [torch.ones(2)]
    assert layout.whole(model.weight) is model.weight
    assert layout.cut(batch) is batch
    assert layout.bring_together(batch) is batch
    assert layout.stateful(model) is model
    assert layout.cuts({"model": model}, optimizer, {}) is None
    layout.check_optimizer(optimizer)
    with layout.gathered():
        assert model(torch.ones(1, 2)).shape == (1, 2)
