"""A small run in this process, made of real parts, for the unit tests of run/.

run = small_run(tmp_path, grad_clip_norm=1.0)      # assembled, nothing trained
result = trained(tmp_path, max_steps=4)            # the content of result.json
"""

import io
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from disttrain.backend import Backend
from disttrain.backend.single import SingleBackend
from disttrain.config import Config
from disttrain.engine import Engine, Events
from disttrain.handlers.preemption import Preemption
from disttrain.run.assemble import assemble
from disttrain.run.directory import RunDirectory
from disttrain.run.state import Run
from disttrain.run.train import train


def points(num_samples: int = 32) -> Dataset[tuple[Tensor, ...]]:
    x = torch.randn(num_samples, 3, generator=torch.Generator().manual_seed(num_samples))
    return TensorDataset(x, x.sum(1, keepdim=True))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def small_config(**changes: Any) -> Config:
    defaults: dict[str, Any] = {
        "name": "small",
        "seed": 5,
        "model": net,
        "train_data": points,
        "valid_data": partial(points, 12),
        "loss": nn.MSELoss(),
        "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "global_batch_size": 8,
        "num_slots": 2,
        "max_epochs": 2,
    }
    return Config(**(defaults | changes))


def console() -> Console:
    """Return a console that keeps its output; `printed` returns it."""
    return Console(file=io.StringIO(), width=200, markup=False, highlight=False)


def printed(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def single() -> Backend:
    return SingleBackend(torch.device("cpu"), 0)


def small_run(folder: Path, left_out: dict[int, str] | None = None, **changes: Any) -> Run:
    """Assemble a run in `folder`; nothing is written yet."""
    directory = RunDirectory(folder / "small")
    return assemble(small_config(**changes), single(), directory, {} if left_out is None else left_out)


def trained(folder: Path, to: Console | None = None, *, fresh: bool = False, **changes: Any) -> dict[str, Any]:
    """Train in `folder`, from its newest checkpoint on; return the content of result.json."""
    threads, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        with single() as backend, Preemption() as preemption:
            directory = RunDirectory(folder / "small")
            return train(small_config(**changes), backend, directory, to or console(), preemption, fresh=fresh)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def dies_after(step: int) -> Any:
    """Return a handler that ends the run with a ValueError after a step."""

    def dying(trainer: Engine, run: Run) -> None:
        @trainer.on(Events.ITERATION_COMPLETED(once=step))
        def die() -> None:
            raise ValueError("on purpose")

    return dying
