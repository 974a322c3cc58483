"""The `disttrain` command by its words."""

from io import StringIO

import pytest
import torch
from rich.console import Console

from disttrain import __version__
from disttrain.cli import doctor, main
from disttrain.config import field_table


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Return the exit code and what was printed."""
    try:
        code = main(words)
    except SystemExit as end:  # how argparse ends
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_doctor_says_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "doctor")
    assert code == 0
    rows = dict(line.split() for line in out.splitlines() if len(line.split()) == 2)
    assert rows["disttrain"] == __version__
    assert rows["torch"] == torch.__version__
    assert {"numpy", "pydantic", "rich", "safetensors", "torchmetrics", "cores"} <= set(rows)
    for word in ("python", "accelerator", "backend gloo", "backend nccl"):
        assert f"\n{word} " in f"\n{out}"


def test_doctor_says_what_is_missing_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disttrain.cli.PACKAGES", ("a-package-that-nobody-has",))
    screen = StringIO()
    assert doctor(Console(file=screen)) == 0
    assert "a-package-that-nobody-has  not installed" in screen.getvalue()


def test_launch_is_the_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "launch", "--help")
    assert code == 0
    assert out.startswith("usage: python -m disttrain.launch")
    missing = [row.name for row in field_table() if row.name not in out]
    assert missing == []
    code, _, err = said(capsys, "launch", "no-such-cfg.py", "--check")
    assert code == 2
    assert "no-such-cfg.py" in err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version") == (0, f"disttrain {__version__}\n", "")
    assert said(capsys, "launch", "--version") == (0, f"disttrain {__version__}\n", "")
    code, out, _ = said(capsys, "--help")
    assert code == 0
    assert "doctor" in out
    assert "launch" in out


@pytest.mark.parametrize("words", [(), ("fly",), ("doctor", "who")])
def test_another_word_is_refused(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    code, out, err = said(capsys, *words)
    assert (code, out) == (2, "")
    assert "usage: disttrain" in err
