"""The fixtures of the XLA tests. They need torch_xla and run by `make test-xla`; without torch_xla they are ignored."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from replicas import Replicas

collect_ignore_glob = [] if find_spec("torch_xla") is not None else ["test_*.py"]


@pytest.fixture(scope="session")
def replicas() -> Iterator[Replicas]:
    """Real XLA replicas on the CPU device; see replicas.py."""
    pool = Replicas()
    yield pool
    pool.close()
