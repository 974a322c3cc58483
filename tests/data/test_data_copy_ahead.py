"""A copy ahead gives the same batches in the same order and at the same positions, and errors come at their step.

Where no accelerator with streams is at hand, two objects that only write down what they are asked stand in for it:
one for `Copies` in the loader, one for the streams under `Copies`.
"""

import pytest
import torch
from augmented_data import NUM_SAMPLES, NUM_STEPS, Augmented, Broken, loader_of, sampler_of, samples_of, take

from disttrain.data import Copies, LoadingError, SlotLoader, copies_for
from disttrain.engine.step_defaults import to_device

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Noted:
    """Stands for Copies: returns the batches, and records the calls."""

    def __init__(self):
        self.calls = []

    def start(self, batch):
        self.calls.append("start")
        return batch

    def finish(self):
        self.calls.append("finish")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_batches_are_those_of_a_loader_without_it(num_workers):
    expected = take(loader_of(), 2 * NUM_STEPS + 1)
    assert take(loader_of(copies=Noted(), num_workers=num_workers), 2 * NUM_STEPS + 1) == expected


@pytest.mark.parametrize("device", DEVICES)
def test_on_a_device_too(device):
    copies = copies_for(torch.device(device), to_device)
    assert (copies is None) == (device == "cpu")
    loader = loader_of(copies=copies, pin_memory=copies is not None)
    batches = [batch for _ in range(2) for batch in loader]
    assert {tensor.device.type for batch in batches for microbatch in batch for tensor in microbatch[:2]} == {device}
    assert [samples_of(batch) for batch in batches] == take(loader_of(), 2 * NUM_STEPS)


def test_one_is_under_way_while_one_is_in_use():
    copies = Noted()
    loader = loader_of(copies=copies)
    next(iter(loader))
    assert copies.calls == ["start", "finish", "start"]  # the first step, then the second, whose copy may still run
    next(iter(loader))
    assert copies.calls[3:] == ["finish", "start"]


def test_the_position_is_that_of_what_was_yielded():
    loader, plain = loader_of(copies=Noted()), loader_of()
    for _ in range(2):
        for batch, expected in zip(loader, plain, strict=True):
            assert (batch.epoch, batch.step, batch.slots) == (expected.epoch, expected.step, expected.slots)
            assert (loader.epoch, loader.step) == (plain.epoch, plain.step)
            assert loader.state_dict() == plain.state_dict()


@pytest.mark.parametrize("goes", ["nowhere", "back", "on", "closed"])
def test_seeking_and_closing_drop_what_was_ahead(goes):
    loader, plain = loader_of(copies=Noted()), loader_of()
    for each in (loader, plain):
        take(each, 2)
        if goes == "closed":
            each.close()
        else:
            each.seek(0, {"nowhere": 2, "back": 0, "on": 3}[goes])
    assert take(loader, 3) == take(plain, 3)


def test_what_a_sample_raises_comes_in_its_steps_turn():
    bad = sampler_of().batch(0, 2, 0)[0]
    loader = SlotLoader(Broken(NUM_SAMPLES, bad, ValueError("bad pixels")), sampler_of(), copies=Noted())
    steps = iter(loader)
    assert [samples_of(next(steps)) for _ in range(2)] == take(loader_of(), 2)
    assert (loader.epoch, loader.step) == (0, 2)
    with pytest.raises(LoadingError, match="bad pixels"):
        next(steps)
    assert (loader.epoch, loader.step) == (0, 2)
    with pytest.raises(LoadingError, match="bad pixels"):  # and at each further try
        next(iter(loader))


class Stream:
    """Stands for torch.Stream: records the queued work in order; `with` makes it the current stream."""

    current: list["Stream"] = []

    def __init__(self, device=None):
        self.device = device
        self.queued = []

    def wait_stream(self, other):
        self.queued.append(("wait", other, len(other.queued)))

    def __enter__(self):
        Stream.current.append(self)

    def __exit__(self, *_):
        Stream.current.pop()


def test_each_stream_waits_for_the_other_where_it_must(monkeypatch):
    computing = Stream()
    Stream.current = [computing]
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Stream.current[-1])

    def move(batch, device, non_blocking):
        assert non_blocking
        Stream.current[-1].queued.append(("copy", batch))
        return batch

    copies = Copies(torch.device("cuda", 0), move)
    copying = copies._stream
    assert copying is not computing
    for step in range(3):
        if step == 0:
            copies.start(step)
        copies.finish()
        copies.start(step + 1)
        computing.queued.append(("step", step))

    # Step i waits for copy i, never for copy i + 1. Copy i + 1 waits for the steps before i, whose memory it may reuse.
    position = {what: at for at, what in enumerate(copying.queued) if what[0] == "copy"}
    for step in range(3):
        at = computing.queued.index(("step", step))
        waited = max(length for kind, _, length in (w for w in computing.queued[:at] if w[0] == "wait"))
        assert waited == position["copy", step] + 1
        before = [w for w in copying.queued[: position["copy", step + 1]] if w[0] == "wait"][-1]
        done = [what for what in computing.queued[: before[2]] if what[0] == "step"]
        assert done == [("step", earlier) for earlier in range(step)]


def test_the_cpu_and_devices_without_streams_copy_in_the_step():
    assert copies_for(torch.device("cpu"), to_device) is None
    assert copies_for(torch.device("mps"), to_device) is None
    assert [samples_of(batch) for batch in SlotLoader(Augmented(NUM_SAMPLES), sampler_of())] == take(
        loader_of(), NUM_STEPS
    )
