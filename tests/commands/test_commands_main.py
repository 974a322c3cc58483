"""`disttrain COMMAND`: each word runs its command, and --help lists the commands."""

import re

import pytest

from disttrain import __version__
from disttrain.commands.main import main
from disttrain.config import field_table


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run the command line; return the exit code, the output and the errors."""
    try:
        code = main(words)
    except SystemExit as end:  # argparse ends in this way
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_launch_is_the_same_as_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "launch", "--help")
    assert code == 0
    assert out.startswith("usage: python -m disttrain.launch")
    missing = [row.name for row in field_table() if row.name not in out]
    assert missing == []
    code, _, err = run(capsys, "launch", "no-such-cfg.py", "--check")
    assert code == 2
    assert "no-such-cfg.py" in err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"disttrain {__version__}\n", "")
    assert run(capsys, "launch", "--version") == (0, f"disttrain {__version__}\n", "")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("launch", "verify", "checkpoint", "compare", "doctor"):
        assert re.search(rf"(?m)^    {command}\s", out)
        code, usage, _ = run(capsys, command, "--help")
        assert code == 0
        assert usage.startswith("usage: ")


def test_doctor_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert re.search(rf"(?m)^disttrain +{re.escape(__version__)} *$", out), out


@pytest.mark.parametrize("words", [(), ("fly",), ("doctor", "fly")])
def test_an_unknown_word_is_refused(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert "usage: disttrain" in err
