"""The counter of lines behind docs/trainings.md counts what its rule says."""

from pathlib import Path

import pytest
from program_lines import RUFF, lines_of

pytestmark = pytest.mark.skipif(not RUFF.exists(), reason="ruff, which is in disttrain[dev], is not installed")


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('"""A docstring\n\nof three lines."""\n\n# a comment\nimport os\nfrom sys import (\n    argv,\n)\n', 0),
        ("x = 1\n\n\ny = 2  # a comment\n", 2),
        ("f(\n    1,\n    2,\n)\n", 1),  # without its magic comma it is one line
        (f"f({'a' * 60}, {'b' * 60})\n", 4),  # each argument on a line of its own
        ('def f():\n    """A docstring."""\n    import os\n    return """a\n\nb\n"""\n', 4),
        ("@first\n@second\nclass A:\n    x = 1\n", 4),
    ],
)
def test_lines_are_those_of_the_formatter_that_do_something(tmp_path: Path, text: str, lines: int) -> None:
    assert lines_of(written(tmp_path, program=text), ["program.py"]) == lines


LIBRARY = """
import numpy
SIZE = 3
def used():
    return helper() + SIZE
def helper():
    return numpy.ones(3)
def unused():
    return 1
class Part:
    size: int = SIZE
if __name__ == "__main__":
    used()
"""


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("import library\nprint(1)\n", 1),
        ("import library\nprint(library.used())\n", 1 + 5),
        ("from library import used as other\nprint(other())\n", 1 + 5),
        ("from library import Part, helper\nprint(Part, helper())\n", 1 + 5),
        ("import library\nprint(library.used)\nprint(library.Part)\n", 2 + 7),
        ("import numpy\nprint(numpy.ones(3))\n", 1),
    ],
)
def test_of_another_file_counts_what_is_used(tmp_path: Path, text: str, lines: int) -> None:
    assert lines_of(written(tmp_path, library=LIBRARY, program=text), ["program.py"]) == lines


def test_what_two_programs_use_counts_once(tmp_path: Path) -> None:
    code = "from library import used\nprint(used())\n"
    folder = written(tmp_path, library=LIBRARY, one=code, other=code)
    assert lines_of(folder, ["one.py", "other.py"]) == 2 + 5
    assert lines_of(folder, ["one.py", "library.py"]) == 1 + 11


def test_shell_commands_count_line_by_line(tmp_path: Path) -> None:
    assert lines_of(tmp_path, ["sweeps.md"]) == 4
