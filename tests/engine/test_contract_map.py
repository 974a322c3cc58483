"""The maps from the contract's sentences to tests name tests that exist."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


@pytest.mark.parametrize("page", sorted(path.name for path in Path(__file__).parent.glob("CONTRACT_*.md")))
def test_every_test_named_exists(page: str) -> None:
    named = NAMED.findall((Path(__file__).parent / page).read_text())
    assert len(named) > 20
    for file, test in named:
        assert re.search(rf"^\s*def {test}\(", (TESTS / file).read_text(), re.MULTILINE), f"{file}::{test}"
