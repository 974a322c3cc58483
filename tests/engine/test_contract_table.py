"""CONTRACT.md names only tests that exist, and every test of the engine's core."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def defined_in(*paths):
    return {name for path in paths for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}


def named():
    return set(re.findall(r"`(test_\w+)`", (HERE / "CONTRACT.md").read_text()))


def test_every_test_the_table_names_exists():
    existing = defined_in(*HERE.glob("test_*.py"), HERE.parent / "properties" / "test_engine_model.py")
    assert named() - existing == set()


def test_the_table_names_every_test_of_the_core():
    core = defined_in(*HERE.glob("test_engine_*.py"))
    assert core - named() == set()
