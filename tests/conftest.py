"""What all tests share: the pool of ranks, and that no test depends on the machine being quick, or on luck.

Laws are tried on the same examples each time; `make soak` looks for others (`--hypothesis-profile explore`).
"""

from collections.abc import Iterator

import pytest
from hypothesis import settings
from ranks import Ranks

settings.register_profile("same-examples", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("same-examples")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Real gloo ranks that stay alive over the session; see ranks.py."""
    pool = Ranks()
    yield pool
    pool.close()
