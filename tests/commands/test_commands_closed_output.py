"""Output that nobody reads is dropped; pipes that close are real ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from disttrain.commands.closed_output import output_may_close

PRINTS = """
import os, sys
from disttrain.commands.closed_output import output_may_close
with output_may_close():
    for number in range(2000):
        print(number, "and some more words, so that the pipe's buffer is full soon enough")
    sys.stdout.flush()
    os.write(1, b"a library that writes by itself")
    print("still here", file=sys.stderr)
"""


def test_a_program_goes_on_when_its_reader_has_gone() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", PRINTS], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "still here\n")


def test_a_program_whose_output_is_closed_from_the_start_gets_one_that_drops() -> None:
    closed = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-c', sys.argv[1]])"
    done = subprocess.run([sys.executable, "-c", closed, PRINTS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "still here\n")


def test_what_can_be_printed_is_printed_and_the_streams_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with output_may_close():
        print("out")
        print("err", file=sys.stderr)
        assert sys.stdout.isatty() is False
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("out\n", "err\n")


def test_a_full_device_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with output_may_close():
            print("lost")
            sys.stdout.flush()
            print("and more")
