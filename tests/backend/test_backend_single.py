"""One process without a process group: its device, its restarts, and results that share no memory with the input."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disttrain.backend import connect
from disttrain.backend.single import SingleBackend
from disttrain.errors import BackendError

CPU = torch.device("cpu")


def test_it_is_a_world_of_one_without_a_group_or_a_thread() -> None:
    threads = threading.active_count()
    backend = SingleBackend(torch.device("meta"), restarts=2)
    assert (backend.rank, backend.world_size, backend.restarts) == (0, 1, 2)
    assert backend.device == torch.device("meta")
    assert backend.process_group is None
    assert threading.active_count() == threads


@given(st.lists(st.floats(width=32), max_size=9))
def test_a_gather_is_a_copy_with_the_same_bits(values: list[float]) -> None:
    backend, tensor = SingleBackend(CPU), torch.tensor(values)
    gathered = backend.all_gather(tensor)
    assert gathered.shape == (1, len(values))
    assert torch.equal(gathered[0].view(torch.int32), tensor.view(torch.int32))
    gathered.add_(1)
    assert torch.equal(tensor.view(torch.int32), torch.tensor(values).view(torch.int32))


def test_two_may_be_open_at_a_time_and_each_closes_alone() -> None:
    first, second = connect("single", device="cpu"), connect("single", device="cpu")
    first.close()
    assert second.all_reduce(3) == 3
    second.close()
    with pytest.raises(BackendError, match=r"expected an open backend for barrier\(\), got a closed one"):
        first.barrier()
