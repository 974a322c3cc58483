"""A ledger is read back as it was written, without a line that a kill cut short; what no run wrote is refused."""

import json
from pathlib import Path

import pytest

from disttrain.errors import ConfigError
from disttrain.evidence import read_ledger

LINES = {
    0: {"step": 0, "epoch": 0, "state": {"model.a": "1"}},
    1: {"step": 1, "epoch": 1, "order": "o", "loss": "0x1p+0", "grad_norm": None, "learning_rate": "0x1p-3"},
    2: {"step": 2, "epoch": 1, "loss": None, "grad_norm": None, "learning_rate": "0x1p-3", "left_out": "bad"},
}


def written(path: Path, rest: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES.values()) + rest)
    return path


@pytest.mark.parametrize("rest", ["", '{"step": 3, "ep'])
def test_a_ledger_gives_its_lines(tmp_path: Path, rest: str) -> None:
    assert read_ledger(written(tmp_path / "ledger", rest)) == LINES


def test_what_no_run_wrote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ledger.jsonl, got: No such file"):
        read_ledger(tmp_path / "ledger.jsonl")
    (tmp_path / "empty").write_text("\0\0")
    with pytest.raises(ConfigError, match=r"expected steps in the ledger .*empty, got none yet"):
        read_ledger(tmp_path / "empty")
    more = json.dumps(LINES[1]) + "\n"
    with pytest.raises(ConfigError, match=r"line 4: .*it has no loss"):
        read_ledger(written(tmp_path / "damaged", '{"step": 7, "grad_norm": null, "learning_rate": null}\n' + more))
