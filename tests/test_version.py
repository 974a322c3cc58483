"""The version is one that packaging accepts, and the one that packaging reads."""

import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.version import Version

import disttrain
from disttrain.version import __version__

ROOT = Path(__file__).parents[1]


def test_packaging_accepts_the_version_as_it_is_written() -> None:
    assert str(Version(__version__)) == __version__


def test_packaging_reads_it_from_this_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["version"]["path"] == "disttrain/version.py"
    assert version("disttrain") == __version__  # after a change of the version: pip install -e .


def test_the_package_shows_it() -> None:
    assert disttrain.__version__ == __version__
