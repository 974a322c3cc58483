"""Simulated power losses, if the machine allows them: `tests/soak/power.py` in short.

They run in a process of their own, which is left alone if it does not end: a process that waits in the kernel for a
disk without power cannot be killed, and a test that waits for it would never end.
"""

import subprocess
import sys
from pathlib import Path

import pytest

POWER = Path(__file__).parents[1] / "soak" / "power.py"


@pytest.mark.slow
def test_a_power_loss_takes_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, POWER, "--losses", "3"], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    code = process.wait(300)
    text = (tmp_path / "output.txt").read_text()
    if "power losses: not run:" in text:
        pytest.skip(text.strip())
    assert code == 0, text
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "synchronous" in line]
    found = [(saves, losses, lost, damaged) for _, saves, losses, _torn, lost, damaged, *_ in rows]
    assert found == [("synchronous", "3", "0", "0"), ("asynchronous", "3", "0", "0")]
