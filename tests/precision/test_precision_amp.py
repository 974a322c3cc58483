"""torch.amp: the numbers in which each part computes, and the updates that a scaler skips."""

import io
import math

import pytest
import torch
from torch import nn

from disttrain.precision import AMP

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def make(device: str, fused: bool = False) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1).to(device)
    return model, torch.optim.SGD(model.parameters(), lr=0.25, fused=fused)


def one_update(precision, model, optimizer, factor: float = 1.0, before_step=None) -> bool:
    """Run one update on ones; `factor` multiplies the loss, so inf makes the gradients overflow.

    The loss is a fourth of the mean over four samples, so its product with the first scale of 2**16 fits in float16.
    """
    optimizer.zero_grad()
    with precision.forward():
        loss = model(torch.ones(4, 4, device=next(model.parameters()).device)).float().mean() * (factor / 4)
    precision.backward(loss, optimizer)
    return precision.update(optimizer, before_step)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
def test_matmuls_in_dtype_parameters_and_gradients_in_float32(device, dtype, name):
    model, optimizer = make(device)
    precision = AMP(device, dtype)
    with precision.forward():
        y = model(torch.ones(4, 4, device=device))
    precision.backward(y.float().sum(), optimizer)
    assert (precision.name, y.dtype) == (name, dtype)
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert torch.matmul(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_the_default_dtype_is_autocasts_own_without_a_scaler_and_float16_with_one():
    assert AMP("cpu").name == "bf16"
    assert AMP("cuda").name == "fp16"
    assert AMP("cpu", scaler=True).name == "fp16"
    assert AMP("cpu", torch.bfloat16, scaler=True).name == "bf16"


@pytest.mark.parametrize("scaler", [None, False])
def test_without_a_scaler_nothing_is_scaled_and_nothing_is_kept(scaler):
    model, optimizer = make("cpu")
    precision = AMP("cpu", scaler=scaler)
    weight = model.weight.detach().clone()
    assert one_update(precision, model, optimizer) is True
    assert torch.equal(model.weight.detach(), weight - 0.0625)
    assert precision.scaler is None
    assert precision.state_dict() == {}
    assert one_update(precision, model, optimizer, before_step=lambda: False) is False


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_skips_exactly_that_update_and_halves_the_scale(device, fused):
    model, optimizer = make(device, fused)
    precision = AMP(device, torch.float16, scaler=True)
    weight = model.weight.detach().clone()
    stepped = [one_update(precision, model, optimizer, factor) for factor in (1.0, math.inf, 1.0)]
    assert stepped == [True, False, True]
    assert torch.equal(model.weight.detach(), weight - 2 * 0.0625)
    assert precision.scaler.get_scale() == 2.0**16 / 2
    assert precision.num_skipped == 1


@pytest.mark.parametrize(("fused", "called"), [(False, 2), (True, 3)])
def test_what_update_returns_is_the_only_word_on_whether_the_optimizer_stepped(fused, called):
    model, optimizer = make("cpu", fused)
    precision, calls = AMP("cpu", torch.float16, scaler=True), []
    optimizer.register_step_post_hook(lambda *_: calls.append(True))
    stepped = [one_update(precision, model, optimizer, factor) for factor in (1.0, math.inf, 1.0)]
    assert stepped == [True, False, True]
    assert len(calls) == called  # a fused optimizer is called with the overflow, and then does nothing


def test_before_step_sees_unscaled_gradients_and_overflows_too():
    model, optimizer = make("cpu")
    precision = AMP("cpu", scaler=True)
    seen = []
    for factor in (1.0, math.inf):
        one_update(precision, model, optimizer, factor, lambda: seen.append(model.bias.grad.clone()))
    assert seen[0].item() == 0.25
    assert not math.isfinite(seen[1].item())


def test_before_step_that_says_no_skips_the_optimizer_alone():
    model, optimizer = make("cpu")
    precision = AMP("cpu", scaler=torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2))
    weight = model.weight.detach().clone()
    assert one_update(precision, model, optimizer, before_step=lambda: False) is False
    assert torch.equal(model.weight.detach(), weight)
    assert precision.num_skipped == 0
    assert one_update(precision, model, optimizer, before_step=lambda: True) is True
    assert precision.scaler.get_scale() == 16.0  # both updates count for the growth of the scale
    assert one_update(precision, model, optimizer, math.inf, lambda: False) is False
    assert (precision.scaler.get_scale(), precision.num_skipped) == (8.0, 1)


def test_a_disabled_scaler_steps_plainly():
    model, optimizer = make("cpu")
    precision = AMP("cpu", scaler=torch.amp.GradScaler("cpu", enabled=False))
    weight = model.weight.detach().clone()
    assert one_update(precision, model, optimizer, before_step=lambda: None) is True
    assert torch.equal(model.weight.detach(), weight - 0.0625)


def test_the_scaler_resumes_from_a_weights_only_file():
    model, optimizer = make("cpu")
    precision = AMP("cpu", scaler=True)
    for factor in (math.inf, 1.0, math.inf):
        one_update(precision, model, optimizer, factor)
    file = io.BytesIO()
    torch.save(precision.state_dict(), file)
    file.seek(0)
    resumed = AMP("cpu", scaler=True)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.scaler.state_dict() == precision.scaler.state_dict()
    assert (resumed.scaler.get_scale(), resumed.num_skipped) == (2.0**14, 2)


def test_a_state_of_another_precision_leaves_the_scaler_new():
    precision = AMP("cpu", scaler=True)
    precision.load_state_dict({})
    assert precision.scaler.get_scale() == 2.0**16
    bf16 = AMP("cpu")
    bf16.load_state_dict(precision.state_dict())
    assert bf16.state_dict() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=r"torch.float16 or torch.bfloat16, got torch\.(float32|int8)"):
        AMP("cpu", dtype)


def test_a_device_without_autocast_is_refused():
    with pytest.raises(ValueError, match="got 'meta'; use fp32"):
        AMP("meta")
