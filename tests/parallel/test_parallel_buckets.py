"""Buckets: how parameters are cut, when they are sent, and gradients that arrive in parts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from disttrain.errors import ConfigError
from disttrain.parallel.buckets import Bucket, Buckets, cut_into_buckets


def parameters_of(*sizes: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]


def test_buckets_go_from_the_last_parameter_to_the_first_and_the_first_leaves_early() -> None:
    mega = 1024**2
    parameters = parameters_of(3 * mega, 3 * mega, 3 * mega, mega // 8, mega // 8)
    buckets = cut_into_buckets(parameters)
    assert [bucket.index for bucket in buckets] == [[4, 3], [2, 1], [0]]  # of at most 1 MiB, then of 25 MiB
    assert [bucket.flat.numel() for bucket in buckets] == [mega // 4, 6 * mega, 3 * mega]


def test_a_bucket_has_one_dtype_and_its_views_the_strides_of_the_parameters() -> None:
    image = nn.Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    wave = nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))
    parameters = [*parameters_of(3), wave, *parameters_of(5, dtype=torch.float64), image]
    buckets = cut_into_buckets(parameters)
    assert [bucket.index for bucket in buckets] == [[3, 0], [2], [1]]
    assert [bucket.flat.dtype for bucket in buckets] == [torch.float32, torch.float64, torch.float32]
    assert [bucket.flat.numel() for bucket in buckets] == [123, 5, 12]
    for bucket in buckets:
        values = torch.arange(1.0, bucket.flat.numel() + 1, dtype=bucket.flat.dtype)
        views = bucket.views(values, parameters)
        assert [view.shape for view in views] == [parameters[i].shape for i in bucket.index]
        assert [view.stride() for view in views] == [parameters[i].stride() for i in bucket.index]
        assert [view.dtype for view in views] == [parameters[i].dtype for i in bucket.index]
        real = [torch.view_as_real(view) if view.is_complex() else view for view in views]
        assert sorted(torch.cat([each.reshape(-1) for each in real]).tolist()) == values.tolist()


class Sent:
    """Two layers in two buckets, and what was sent when."""

    def __init__(self, **options: Any) -> None:
        self.layers = nn.ModuleList([nn.Linear(512, 1024, **options), nn.Linear(1024, 512, **options)])
        self.parameters = list(self.layers.parameters())
        self.log: list[Any] = []
        self.buckets = Buckets(self.parameters, lambda bucket: self.log.append(bucket.index))

    def step(self, loss: Tensor) -> list[Any]:
        """Return the buckets in the order in which they were sent, and "backward" where the backward ended."""
        self.log.clear()
        self.buckets.begin()
        self.buckets.opens()
        loss.backward()
        self.log.append("backward")
        self.buckets.complete()
        return list(self.log)

    def loss(self) -> Tensor:
        first, second = self.layers
        return second(first(torch.ones(1, 512))).sum()


def test_the_first_backward_sends_nothing_and_the_others_as_buckets_become_complete() -> None:
    sent = Sent()
    assert sent.step(sent.loss()) == ["backward", [3], [2, 1, 0]]
    assert sent.step(sent.loss()) == [[3], [2, 1, 0], "backward"]


def test_a_parameter_that_is_not_used_is_sent_after_the_backward() -> None:
    sent = Sent()
    sent.step(sent.loss())
    assert sent.step(sent.layers[0](torch.ones(1, 512)).sum()) == ["backward", [3], [2, 1, 0]]
    assert sent.step(sent.layers[1](torch.ones(1, 1024)).sum()) == [[3], "backward", [2, 1, 0]]


def test_a_hook_that_may_change_a_gradient_runs_before_it_is_sent() -> None:
    sent = Sent()
    sent.step(sent.loss())
    handle = sent.parameters[3].register_post_accumulate_grad_hook(lambda parameter: sent.log.append("hook"))
    assert sent.step(sent.loss()) == ["hook", "backward", [3], [2, 1, 0]]
    handle.remove()
    assert sent.step(sent.loss())[-1] == "backward"


def twice(sent: Sent) -> Tensor:
    x = torch.ones(1, 512, requires_grad=True)
    for layer in (*sent.layers, *sent.layers):
        x = checkpoint(layer, x, use_reentrant=True)
    return x.sum()


def test_gradients_that_arrive_in_parts_from_the_start_are_sent_after_the_backward() -> None:
    sent = Sent()
    for _ in range(3):
        assert sent.step(twice(sent)) == ["backward", [3], [2, 1, 0]]


def test_gradients_that_arrive_in_parts_later_are_refused() -> None:
    sent = Sent()
    sent.step(sent.loss())
    with pytest.raises(ConfigError, match="arrived in two parts, but at once in the steps before"):
        sent.step(twice(sent))


def test_a_bucket_is_sent_once_in_a_step_that_is_tried_again() -> None:
    sent = Sent()
    sent.step(sent.loss())
    sent.buckets.begin()
    sent.buckets.opens()
    sent.loss().backward()  # and an exception before `complete`
    assert sent.step(sent.loss()) == [[3], [2, 1, 0], "backward"]


def test_close_takes_the_hooks_off() -> None:
    sent = Sent()
    sent.buckets.close()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in sent.parameters)
    assert isinstance(sent.buckets.buckets[0], Bucket)
