"""Write the training and validation curves of a run to `metrics/`: as JSONL, and for TensorBoard if it is installed."""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from disttrain.errors import ConfigError
from disttrain.files import JsonLines
from disttrain.handlers.losses import Pace

logger = logging.getLogger(__name__)


class TensorBoard:
    """Writes events to `folder`; steps of a resumed run replace those that the killed run had written after `step`."""

    def __init__(self, folder: Path, step: int) -> None:
        if find_spec("tensorboard") is None:
            raise ConfigError(
                "log.tensorboard=True: expected TensorBoard to be installed, got none; "
                "pip install 'disttrain[tensorboard]', or set log.tensorboard=False"
            )
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self._lost = False

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the values that are single numbers; the JSONL file holds the others too."""
        try:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not self._lost:
                    self._writer.add_scalar(name, value, step)
        except FileNotFoundError as error:  # the run directory is gone: the next save stops the run, and says so
            self._lost = True
            logger.warning("the curves for TensorBoard end here: %s", error)

    def close(self) -> None:
        """Close the writer; a failure is only logged, for it may follow from the error that ends the run."""
        try:
            self._writer.close()
        except OSError as error:
            logger.warning("the last curves for TensorBoard are not written: %s", error)


class Curves:
    """Writes files in `folder`, on rank 0 only, and continues them after `step`.

    `tensorboard="auto"` writes for TensorBoard if it is installed.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool | Literal["auto"]) -> None:
        self._train = JsonLines(folder / "train.jsonl", step)
        self._valid = JsonLines(folder / "valid.jsonl", step)
        wanted = find_spec("tensorboard") is not None if tensorboard == "auto" else tensorboard
        self._board = TensorBoard(folder / "tensorboard", step) if wanted else None

    def trained(self, lines: list[dict[str, Any]], pace: Pace) -> None:
        """Write a line for each step; TensorBoard gets the newest step only."""
        self._train.write(*lines)
        if self._board is not None:
            names = ("loss", "grad_norm", "learning_rate", "samples_per_second")
            values = {name: getattr(pace, name) for name in names} | dict(pace.values)
            self._board.add(pace.step, {f"train/{name}": value for name, value in values.items()})

    def validated(self, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Write the results of an evaluation."""
        self._valid.write({"step": step, "epoch": epoch, **values})
        if self._board is not None:
            self._board.add(step, {f"valid/{name}": value for name, value in values.items()})

    def newest(self) -> dict[str, Any]:
        """Return the last training line without its step; empty if there is none."""
        return {name: value for name, value in self._train.last.items() if name not in ("step", "epoch")}

    def sync(self) -> None:
        """Flush the written lines to the disk."""
        self._train.sync()
        self._valid.sync()

    def close(self) -> None:
        self._train.close()
        self._valid.close()
        if self._board is not None:
            self._board.close()
