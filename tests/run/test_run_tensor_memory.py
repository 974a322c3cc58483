"""The bytes of tensors are those that a count by hand gives; on a device they are its allocator's."""

from typing import Any

import pytest
import torch
from torch import nn

from disttrain.devices import DEVICE_TYPES, DeviceType
from disttrain.run.tensor_memory import DeviceWatch, HostWatch, watch_on

MIB = 2**20


def floats(mib: int) -> torch.Tensor:
    return torch.empty(mib * MIB // 4)


def test_tensors_come_and_go() -> None:
    with HostWatch() as watch:
        one, two = floats(3), floats(2)
        assert watch.live() == 5 * MIB
        view = one.view(-1, 4)[:7]
        del one
        assert watch.live() == 5 * MIB  # the view keeps it
        del view, two
        assert (watch.live(), watch.peak) == (0, 5 * MIB)
        watch.forget_peak()
        assert watch.peak == 0


def test_what_is_older_counts_neither_as_a_view_nor_when_it_goes() -> None:
    old = floats(4)
    with HostWatch() as watch:
        transposed = old.view(-1, 8).t()
        assert watch.live() == 0
        summed = transposed + 1
        assert watch.live() == 4 * MIB
        del old, transposed
        assert watch.live() == summed.nbytes


def test_a_storage_that_changes_its_size_counts_by_the_difference() -> None:
    old = floats(4)
    with HostWatch() as watch:
        old.untyped_storage().resize_(MIB)
        assert watch.live() == -3 * MIB
        old.untyped_storage().resize_(6 * MIB)
        assert watch.live() == 2 * MIB
        new = floats(1)
        new.untyped_storage().resize_(2 * MIB)
        assert watch.live() == 4 * MIB
    old.untyped_storage().resize_(0)
    assert watch.live() == 4 * MIB  # the watch is over


def test_the_backward_frees_what_the_forward_keeps() -> None:
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
    x = torch.randn(512, 256)
    with HostWatch() as watch:
        loss = model(x).square().mean()
        hidden, out = 512 * 1024 * 4, 512 * 256 * 4
        # ReLU's output, the last layer's output; the input is older, and what goes into ReLU is not kept.
        assert watch.live() == hidden + out + 4
        loss.backward()
        gradients = sum(parameter.nbytes for parameter in model.parameters())
        assert watch.peak >= hidden + out + gradients / 2
        del loss
        assert watch.live() == gradients


def test_a_device_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEVICE_TYPES, "hpu", DeviceType(counts_memory=True))
    now: dict[str, Any] = {"live": 100, "most": 400}
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: now["live"])
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: now["most"])
    monkeypatch.setattr(
        torch.accelerator, "reset_peak_memory_stats", lambda device: now.__setitem__("most", now["live"])
    )
    watch = watch_on(torch.device("hpu", 0))
    assert isinstance(watch, DeviceWatch)
    with watch:
        assert (watch.live(), watch.peak) == (0, 0)
        now.update(live=150, most=500)
        assert (watch.live(), watch.peak) == (50, 400)
        watch.forget_peak()
        assert watch.peak == 50
    assert isinstance(watch_on(torch.device("cpu")), HostWatch)
