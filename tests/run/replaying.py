"""Replays of the small run of this process, for the tests of replay."""

from pathlib import Path
from typing import Any

from small_run import console, single
from torch import Tensor, nn

from disttrain.config import Config
from disttrain.evidence import read_ledger
from disttrain.run.directory import RunDirectory
from disttrain.run.replay import Replay, Replayed, replay_config
from disttrain.run.replay_start import Start, starts_before
from disttrain.run.replayed_slots import SlotWatcher


def replayed(folder: Path, step: int, config: Config, *, only: int | None = None, **options: Any) -> Replayed:
    """Compute a step of the run in `folder` again, from its nearest checkpoint."""
    directory = RunDirectory(folder / "small")
    starts = starts_before(directory, [], step, console())
    return replayed_from(folder, starts, step, config, only=only, **options)


def replayed_from(
    folder: Path, starts: list[Start], step: int, config: Config, *, only: int | None = None, **options: Any
) -> Replayed:
    directory = RunDirectory(folder / "small")
    shadow = RunDirectory(folder / f"shadow-{len(list(folder.iterdir()))}" / "small")
    lines = read_ledger(directory.ledger_jsonl)
    with single() as backend:
        parts = (replay_config(config), backend, directory, shadow, lines, options.pop("to", console()))
        return Replay(*parts, **options).run(starts, SlotWatcher(step, only=only))


def weighted(model: nn.Module, batch: Any) -> Any:
    x, y = batch
    y_pred = model(x)
    return (y_pred - y).square().mean(), y_pred, {"largest": y_pred.abs().max(), "share": (y.sum(), 3.0)}


def embed(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])  # type: ignore[no-any-return]


def spread(embeddings: Tensor) -> Tensor:
    return (embeddings - embeddings.mean(0)).square().mean() - embeddings.sum() * 1e-3
