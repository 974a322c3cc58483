"""Copies the batch of the next step to an accelerator while the current step computes.

*Contract*: work that is queued on the current stream after `finish` sees the copied batch on the device. The host
never waits. The loader decides the order: it starts one copy ahead, and its position is that of the batch that it
yielded last.

A copy begins after all work that was queued before `start`. So it overlaps with the one step that is queued next. This
also keeps the memory safe without `record_stream`: the memory of a used batch returns to the pool of the copying
stream, which reuses it only after that step. It holds for batch objects of unknown types too, whose tensors cannot be
listed.

*Cost*: the device holds one batch more. The copies are asynchronous only from pinned host memory.
"""

from collections.abc import Callable
from typing import Any

import torch

from disttrain.devices import device_row

Move = Callable[[Any, torch.device, bool], Any]
"""(batch, device, non_blocking) -> the batch on the device"""


class Copies:
    """Copies batches to `device`, on a stream of its own."""

    def __init__(self, device: torch.device, move: Move) -> None:
        self._device = device
        self._move = move
        self._stream = torch.Stream(device=device)

    def start(self, batch: Any) -> Any:
        """Queue the copy of a batch and return the copy. Nothing may use it before `finish`."""
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            return self._move(batch, self._device, True)

    def finish(self) -> None:
        """Let all work that is queued from now on wait for the copies that were started."""
        torch.accelerator.current_stream(self._device).wait_stream(self._stream)


def copies_for(device: torch.device, move: Move) -> Copies | None:
    """Return the `Copies` of a device; None for the CPU, and for a device without streams."""
    return Copies(device, move) if device_row(device).copies_ahead else None
