"""The Checkpoint handler on several real ranks: one rank writes, and all agree on the checkpoints and on failures."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import nn

from disttrain.backend import Backend
from disttrain.checkpoint import DirectorySaver, DiskSaver, committed, load_newest, save
from disttrain.engine import Engine, Events
from disttrain.errors import CheckpointError
from disttrain.handlers import Checkpoint


def run(handler: Checkpoint, epochs: int) -> None:
    trainer = Engine(lambda engine, batch: None)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
    trainer.run(range(10), max_epochs=epochs)


def save_files(backend: Backend, root: Path) -> Any:
    model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1), process_group=backend.process_group)
    nn.init.constant_(model.module.weight, backend.rank)
    handler = Checkpoint({"model": model}, DiskSaver(root), n_saved=2, save_on_rank=1, backend=backend)
    run(handler, 3)
    return handler.state_dict()


def test_one_rank_writes_files_and_all_ranks_have_the_list(ranks: Ranks, tmp_path: Path) -> None:
    first, *others = ranks(3, save_files, tmp_path)
    assert first == {"_saved": [(20, "model_20.pt"), (30, "model_30.pt")]}
    assert others == [first, first]
    assert sorted(os.listdir(tmp_path)) == ["model_20.pt", "model_30.pt"]
    assert torch.load(tmp_path / "model_30.pt", weights_only=True)["weight"].item() == 1.0


def save_best(backend: Backend, root: Path) -> Any:
    # The scores of the ranks differ: all ranks use those of the writing rank.
    handler = Checkpoint(
        {"model": nn.Linear(1, 1)},
        DiskSaver(root),
        score_function=lambda engine: engine.state.epoch * (1 if backend.rank == 0 else -1),
        backend=backend,
    )
    run(handler, 3)
    return handler.last_checkpoint


def test_the_writing_ranks_score_decides(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, save_best, tmp_path) == [tmp_path / "model_3.pt"] * 2
    assert os.listdir(tmp_path) == ["model_3.pt"]


def save_directories(backend: Backend, root: Path, together: bool) -> Any:
    saver = DirectorySaver(root, backend=backend if together else None)
    handler = Checkpoint({"model": nn.Linear(1, 1)}, saver, n_saved=2, backend=backend)
    run(handler, 4)
    loaded = load_newest(root, backend)
    assert loaded is not None
    return handler.state_dict()["_saved"], loaded.name


@pytest.mark.parametrize("together", [True, False])
def test_directories_are_written_and_rotated_for_all_ranks(ranks: Ranks, tmp_path: Path, together: bool) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, {})
    expected = ([(30, "step-00000030"), (40, "step-00000040")], "step-00000040")
    assert ranks(2, save_directories, tmp_path, together) == [expected, expected]
    assert committed(tmp_path) == ["step-00000040", "step-00000030"]


class Failing:
    """A save handler that fails at its second save."""

    def __init__(self) -> None:
        self.num_saves = 0

    def __call__(self, checkpoint: Any, filename: str, metadata: Mapping[str, Any]) -> None:
        self.num_saves += 1
        if self.num_saves == 2:
            raise CheckpointError("the disk is full")


def save_in_vain(backend: Backend) -> tuple[Any, int]:
    saver = Failing()
    handler = Checkpoint({"model": nn.Linear(1, 1)}, saver, backend=backend)
    with pytest.raises(CheckpointError, match="the disk is full"):
        run(handler, 3)
    return handler.last_checkpoint, saver.num_saves


def test_a_failure_on_the_writing_rank_is_a_failure_on_all(ranks: Ranks) -> None:
    assert ranks(2, save_in_vain) == [("model_10.pt", 2), ("model_10.pt", 0)]
