"""What all tests share: the pool of ranks."""

from collections.abc import Iterator

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Real gloo ranks that stay alive over the session; see ranks.py."""
    pool = Ranks()
    yield pool
    pool.close()
