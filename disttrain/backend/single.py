"""The backend of one process: the checks, shapes and errors of many ranks, without a process group."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from disttrain.backend.checked import CheckedBackend
from disttrain.backend.failure import Board
from disttrain.environment import Topology


class SingleBackend(CheckedBackend):
    """A world of one rank."""

    name = "single"

    def __init__(self, device: torch.device, restarts: int = 0) -> None:
        self.device = device
        self.topology = Topology()
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
        """Do nothing: the bytes of the only rank are in `data` already."""
