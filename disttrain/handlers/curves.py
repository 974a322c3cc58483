"""What `metrics/` holds: the training and validation curves as JSONL, and for TensorBoard where it is installed."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from disttrain.errors import ConfigError
from disttrain.handlers.losses import Pace
from disttrain.run_directory import JsonLines


class TensorBoard:
    """Writes to `folder`; a resumed run's later steps replace those that the killed one had written."""

    def __init__(self, folder: Path, step: int) -> None:
        if find_spec("tensorboard") is None:
            raise ConfigError("log.tensorboard=True needs TensorBoard: pip install 'disttrain[tensorboard]'")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the values that are single numbers; what is not stays in the JSONL alone."""
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Curves:
    """Writes into `folder` on rank 0, going on after `step`; `tensorboard="auto"` is where it is installed."""

    def __init__(self, folder: Path, step: int, *, tensorboard: bool | Literal["auto"]) -> None:
        self._train = JsonLines(folder / "train.jsonl", step)
        self._valid = JsonLines(folder / "valid.jsonl", step)
        wanted = find_spec("tensorboard") is not None if tensorboard == "auto" else tensorboard
        self._board = TensorBoard(folder / "tensorboard", step) if wanted else None

    def trained(self, lines: list[dict[str, Any]], pace: Pace) -> None:
        """Write a line for each step, and to TensorBoard the newest."""
        self._train.write(*lines)
        if self._board is not None:
            names = ("loss", "learning_rate", "samples_per_second")
            self._board.add(pace.step, {f"train/{name}": getattr(pace, name) for name in names})

    def validated(self, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Write the results of the validation data."""
        self._valid.write({"step": step, "epoch": epoch, **values})
        if self._board is not None:
            self._board.add(step, {f"valid/{name}": value for name, value in values.items()})

    def sync(self) -> None:
        """Flush what was written to the disk."""
        self._train.sync()
        self._valid.sync()

    def close(self) -> None:
        self._train.close()
        self._valid.close()
        if self._board is not None:
            self._board.close()
