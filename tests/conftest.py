"""What all tests share: the pool of ranks, and that no test depends on the machine being quick."""

from collections.abc import Iterator

import pytest
from hypothesis import settings
from ranks import Ranks

settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Real gloo ranks that stay alive over the session; see ranks.py."""
    pool = Ranks()
    yield pool
    pool.close()
