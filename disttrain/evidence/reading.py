"""Reads the ledger of a run, which may be another's, and may still be written.

*Errors*: ConfigError for a ledger that is missing, empty or damaged.
"""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from disttrain.errors import ConfigError
from disttrain.evidence.ledger import Line

MAX_LINE_BYTES = 256 * 2**20
"""The longest line of a ledger that is read into memory."""
_MAX_STEP = 10**15 - 1


class _SlotResults(BaseModel):
    model_config = ConfigDict(strict=True)

    batch: list[str]
    loss: list[str | None]


class _LedgerLine(BaseModel):
    """The line of a step, as `evidence/ledger.py` writes it; a stranger may have written another."""

    model_config = ConfigDict(strict=True)

    step: Annotated[int, Field(ge=0, le=_MAX_STEP)]
    epoch: int = 0
    order: str | None = None
    loss: str | None = None
    grad_norm: str | None = None
    learning_rate: str | None = None
    left_out: str | None = None
    slots: _SlotResults | None = None
    state: dict[str, str] | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> "_LedgerLine":
        needed = {"state"} if self.step == 0 else {"loss", "grad_norm", "learning_rate"}
        if missing := sorted(needed - self.model_fields_set):
            raise ValueError(f"it has no {missing[0]}")
        return self


def read_ledger(path: Path) -> dict[int, Line]:
    """Return the lines of a ledger by step, without a last line that a kill cut short.

    *Errors*: ConfigError in one line for a ledger that is missing or empty, or that no run wrote.
    """
    lines: dict[int, Line] = {}
    damage, number = "", 0
    try:
        with path.open("rb") as file:
            while text := file.readline(MAX_LINE_BYTES):
                if damage:
                    raise ConfigError(
                        f"{path}, line {number}: expected the results of a step, got {damage}; "
                        "restore the file, or compare another run"
                    )
                number += 1
                try:
                    line = _LedgerLine.model_validate_json(text)
                    lines[line.step] = line.model_dump(exclude_unset=True)
                except ValidationError as error:
                    damage = _first_problem(error)  # no error if this is the last line
    except OSError as error:
        raise ConfigError(
            f"expected a run's ledger at {path}, got: {error.strerror}; give the run directory, such as runs/NAME"
        ) from None
    if not lines:
        raise ConfigError(f"expected steps in the ledger {path}, got none yet; wait until the run has done some")
    return lines


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))[:60]
    return f"{place!r}: {first['msg'][:120]}" if place else first["msg"][:120]
