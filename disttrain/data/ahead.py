"""Copies the next step's batch to an accelerator while the present step computes.

*Contract*: what is copied is on the device when `finish` returns it, as far as work that is queued afterwards on the
current stream can tell; nobody waits on the host. Order and number of the batches are the loader's: it asks for one
copy ahead, in order, and its position stays that of what it has yielded.

A copy begins when all that was queued before `start` is done, so it overlaps with the one step that is queued next.
That also keeps the memory safe without `record_stream`: what a step has used goes back to the copying stream's own
pool, which fills it again only after that step; and so it is for objects whose tensors nobody here can see.

*Cost*: one more batch in the device's memory. Pinned host memory makes the copies asynchronous.
"""

from collections.abc import Callable
from typing import Any

import torch

STREAMS = ("cuda", "xpu")
"""Devices that copy on a stream beside the one that computes. Another accelerator is another word here."""

Move = Callable[[Any, torch.device, bool], Any]
"""(batch, device, non_blocking) -> the batch on the device"""


class Copies:
    """Batches on their way to `device`, on a stream of their own."""

    def __init__(self, device: torch.device, move: Move) -> None:
        self._device = device
        self._move = move
        self._stream = torch.Stream(device=device)

    def start(self, batch: Any) -> Any:
        """Queue the copy and return the batch, which nothing may use before `finish`."""
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            return self._move(batch, self._device, True)

    def finish(self) -> None:
        """Let what is queued from now on wait for the copies that were started."""
        torch.accelerator.current_stream(self._device).wait_stream(self._stream)


def copies_for(device: torch.device, move: Move) -> Copies | None:
    """Return what copies ahead to the device; None for the CPU and for one without streams of its own."""
    return Copies(device, move) if device.type in STREAMS else None
