"""One process alone, under the contract of many: same checks, same shapes, same errors, no process group."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from disttrain.backend.base import Place
from disttrain.backend.checked import CheckedBackend
from disttrain.backend.failure import Board


class SingleBackend(CheckedBackend):
    """A world of one rank."""

    name = "single"

    def __init__(self, device: torch.device, restarts: int = 0) -> None:
        self.device = device
        self.place = Place()
        self.restarts = restarts
        self._board = Board()

    @property
    def process_group(self) -> ProcessGroup | None:
        return None

    def close(self) -> None:
        self._closed = True

    def _start_gather(self, data: Tensor) -> Callable[[], Tensor]:
        gathered = data.clone().unsqueeze(0)
        return lambda: gathered

    def _spread(self, data: Tensor, source: int) -> None:
        """Rank 0's bytes are here already."""
