"""The exit codes: those of the documentation and of --help, and the numbers that the system and argparse give them."""

import os
import re
from pathlib import Path

import pytest

from disttrain.commands import launch
from disttrain.commands.exit_codes import (
    ALL_GOOD,
    COMPLETED,
    DAMAGE_FOUND,
    DIFFERENT,
    FAILED,
    INTERRUPTED,
    SAME,
    USAGE,
)
from disttrain.commands.main import main

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_the_page_lists_the_codes_of_launch() -> None:
    page = (DOCS / "launching.md").read_text()
    rows = dict(re.findall(r"(?m)^\| (\d+) \| (\w+)", page[page.index("## Exit codes") :]))
    words = {COMPLETED: "completed", INTERRUPTED: "interrupted", FAILED: "failed", USAGE: "the"}
    assert {int(code): word for code, word in rows.items()} == words
    assert list(launch.MEANINGS) == sorted(words)


@pytest.mark.parametrize(
    ("command", "codes"),
    [
        ("launch", (COMPLETED, FAILED, USAGE, INTERRUPTED)),
        ("verify", (SAME, DIFFERENT, USAGE)),
        ("compare", (SAME, DIFFERENT, USAGE)),
        ("checkpoint", (ALL_GOOD, DAMAGE_FOUND, USAGE)),
    ],
)
def test_help_lists_the_codes(command: str, codes: tuple[int, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    epilog = re.search(r"exit codes: (0: .*?)(?:fields of a Config|$)", text)
    assert epilog is not None
    assert [int(code) for code in re.findall(r"(?:^|; )(\d+): ", epilog[1])] == list(codes)


def test_the_numbers_are_those_of_the_system_and_of_argparse(capsys: pytest.CaptureFixture[str]) -> None:
    assert INTERRUPTED == os.EX_TEMPFAIL
    assert COMPLETED == SAME == ALL_GOOD == os.EX_OK
    with pytest.raises(SystemExit) as ended:
        main(["no-such-command"])
    assert ended.value.code == USAGE
    assert "usage: disttrain" in capsys.readouterr().err
