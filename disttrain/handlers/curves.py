"""What `metrics/` holds: the training and validation curves as JSONL, and for TensorBoard where it is installed."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal

from disttrain.errors import ConfigError
from disttrain.handlers.losses import Pace
from disttrain.run_directory import json_text


class JsonLines:
    """A file of one JSON object a line, each with its `step`, that a resumed run goes on with.

    Opening it at a step drops the lines of later steps: a killed run wrote them, and will write them again.
    A step that has its line is not written twice.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        self._last_step = -1
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    written = json.loads(line)["step"]
                except (ValueError, KeyError, TypeError):
                    break  # a line that a kill cut short; nothing after it is whole
                if written <= step:
                    self._last_step = written
                    kept.append(line + "\n")
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        if line["step"] > self._last_step:
            self._last_step = line["step"]
            self._file.write(json_text(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


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
        for line in lines:
            self._train.write(line)
        if self._board is not None:
            names = ("loss", "learning_rate", "samples_per_second")
            self._board.add(pace.step, {f"train/{name}": getattr(pace, name) for name in names})

    def validated(self, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Write the results of the validation data."""
        self._valid.write({"step": step, "epoch": epoch, **values})
        if self._board is not None:
            self._board.add(step, {f"valid/{name}": value for name, value in values.items()})

    def close(self) -> None:
        self._train.close()
        self._valid.close()
        if self._board is not None:
            self._board.close()
