"""make_deterministic: what it sets, in a process of its own, and what it leaves to the user."""

import os

import pytest
import torch
from ranks import Ranks

from disttrain.backend import Backend, make_deterministic, set_cpu_threads


def settings(backend: Backend, preset: str | None, threads: int) -> tuple[object, ...]:
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if preset is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = preset
    torch.backends.cudnn.benchmark = True
    make_deterministic(threads)
    return (
        os.environ["CUBLAS_WORKSPACE_CONFIG"],
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        torch.get_num_threads(),
    )


def test_everything_that_changes_bits_is_set(ranks: Ranks) -> None:
    assert ranks(1, settings, None, 2) == [(":4096:8", True, True, False, False, 2)]


def test_a_workspace_of_the_users_is_kept(ranks: Ranks) -> None:
    assert ranks(1, settings, ":16:8", 1)[0][0] == ":16:8"


@pytest.mark.parametrize("threads", [0, -1])
def test_an_operation_needs_a_thread(threads: int) -> None:
    with pytest.raises(ValueError, match=f"cpu_threads to be at least 1, got {threads}"):
        set_cpu_threads(threads)
