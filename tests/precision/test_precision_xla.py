"""The step of XLA: the error without torch_xla, and the order of the calls with a double of it.

The double (`doubles/xla`) is three functions over CPU tensors. It shows that torch_xla's step is called once, with a
barrier, and that gradients are reduced before `before_step` is called. It shows nothing about XLA; `make test-xla` runs
the real one.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from disttrain.precision import XLA

DOUBLE = Path(__file__).parent / "doubles" / "xla"


def forget(monkeypatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "torch_xla"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def calls(monkeypatch):
    forget(monkeypatch)
    monkeypatch.syspath_prepend(DOUBLE)
    from torch_xla.core import xla_model

    yield xla_model.calls
    forget(monkeypatch)


def test_the_update_is_torch_xlas_step_with_a_barrier(calls):
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    precision = XLA()
    with precision.forward():
        loss = parameter.sum()
    precision.backward(loss, optimizer)
    assert precision.update(optimizer) is True
    assert calls == [{"optimizer": optimizer, "barrier": True}]
    assert parameter.item() == 0.5


@pytest.mark.parametrize("wanted", [None, False])
@pytest.mark.parametrize("reduces", [True, False])
def test_before_step_sees_gradients_that_have_met_and_may_skip(calls, wanted, reduces):
    parameter = nn.Parameter(torch.tensor([1.0]))
    parameter.grad = torch.tensor([1.0])
    optimizer = torch.optim.SGD([parameter], lr=0.5)

    def before_step():
        calls.append("before_step")
        return wanted

    assert XLA(reduces=reduces).update(optimizer, before_step) is (wanted is None)
    assert calls == ["reduce_gradients"] * reduces + ["before_step", "sync"]
    assert parameter.item() == (0.5 if wanted is None else 1.0)


def test_bfloat16_is_autocasts_and_float16_is_refused(calls):
    precision = XLA(torch.bfloat16)
    context = precision.forward()
    assert (context.device, context.fast_dtype) == ("xla", torch.bfloat16)
    assert (precision.name, XLA().name) == ("bf16", "fp32")
    with pytest.raises(ValueError, match=r"torch.bfloat16 on an xla device, got torch.float16"):
        XLA(torch.float16)


def test_without_torch_xla_it_says_what_to_install(monkeypatch):
    forget(monkeypatch)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "torch_xla").exists()])
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*torch_xla"):
        XLA()
