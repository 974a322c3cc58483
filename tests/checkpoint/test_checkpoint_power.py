"""Simulated power losses, if the machine allows them: the short form of `tests/soak/power.py`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "soak"))

from power import asynchronous, lose, obstacle, synchronous


@pytest.fixture(scope="module")
def possible() -> None:
    if (reason := obstacle()) is not None:
        pytest.skip(f"cannot simulate a power loss: {reason}")


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize("saving", [synchronous, asynchronous])
def test_a_power_loss_takes_nothing_that_was_acknowledged(saving) -> None:
    found = lose(3, saving)
    assert (found.losses, found.lost, found.damaged) == (3, 0, 0)
