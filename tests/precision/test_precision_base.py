"""Full precision is the plain backward and the plain step."""

import torch
from torch import nn

from disttrain.precision import AMP, FP32, Precision


def test_fp32_is_the_step_by_hand():
    parameter, by_hand = nn.Parameter(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0])
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    precision = FP32()
    with precision.forward():
        loss = (parameter**2).sum()
    precision.backward(loss, optimizer)
    seen = []
    assert precision.update(optimizer, lambda: seen.append(parameter.grad.clone())) is True
    assert torch.equal(seen[0], 2 * by_hand)
    assert torch.equal(parameter.detach(), by_hand - 0.5 * 2 * by_hand)


def test_fp32_before_step_that_says_no_skips_the_update():
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    precision = FP32()
    precision.backward(parameter.sum(), optimizer)
    assert precision.update(optimizer, lambda: False) is False
    assert parameter.item() == 1.0
    assert precision.update(optimizer, lambda: True) is True
    assert parameter.item() == 0.0


def test_fp32_has_no_state():
    precision = FP32()
    assert precision.state_dict() == {}
    precision.load_state_dict({})
    assert isinstance(precision, Precision)
    assert isinstance(AMP("cpu"), Precision)
