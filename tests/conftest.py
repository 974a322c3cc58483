"""The pool of ranks and the hypothesis profiles of all tests.

No test depends on the speed of the machine or on chance. Laws are tested on the same examples each time; `make soak`
tests them on new examples (`--hypothesis-profile explore`).
"""

import gc
from collections.abc import Iterator

import pytest
from hypothesis import settings
from ranks import Ranks

settings.register_profile("same-examples", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("same-examples")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Yield real gloo ranks that stay alive over the session; see ranks.py."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Free objects by reference counting alone."""
    gc.disable()
    yield  # a fixture goes on here also after a test that failed
    gc.enable()


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Restore the settings of torch that a run in this process changes."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
