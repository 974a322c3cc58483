"""The collectives over a network that carries everything, and over one that breaks. Conformance tests the values.

tests/backend/test_conformance.py runs the same collectives on every backend.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from disttrain.backend import checked
from disttrain.backend.headers import ROOM_BYTES, is_shared
from disttrain.backend.single import SingleBackend
from disttrain.errors import BackendError, RemoteError

CPU = torch.device("cpu")


class Counted(SingleBackend):
    """A backend of one process that counts the bytes of each gather, and whose network can break during one."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.gathered_bytes: list[int] = []
        self.is_broken = False

    def _start_gather(self, data: Tensor) -> Callable[[], Tensor]:
        self.gathered_bytes.append(data.numel())
        collect = super()._start_gather(data)

        def collect_or_break() -> Tensor:
            if self.is_broken:
                raise RuntimeError("connection reset by peer")
            return collect()

        return collect_or_break


sizes = st.integers(0, 3 * ROOM_BYTES) | st.integers(ROOM_BYTES - 40, ROOM_BYTES + 40)


@given(sizes)
def test_objects_of_every_size_arrive_whole(size: int) -> None:
    backend, value = Counted(), bytes(index % 251 for index in range(size))
    assert backend.all_gather(value) == [value]
    assert backend.broadcast(value) == value


def test_small_values_need_the_header_alone() -> None:
    backend = Counted()
    backend.barrier()
    backend.all_reduce(3)
    backend.all_gather("small")
    backend.broadcast({"a": 1})
    with backend.agree("nothing"):
        pass
    assert backend.gathered_bytes == [1024] * 5


@given(st.integers(0, 300), st.sampled_from([8, 64, 10**6]))
def test_a_reduction_is_the_same_in_pieces_of_any_size(size: int, piece_bytes: int) -> None:
    backend, tensor = Counted(), torch.arange(size, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checked, "REDUCE_PIECE_BYTES", piece_bytes)
        assert torch.equal(backend.all_reduce(tensor), tensor)
    assert max(backend.gathered_bytes) <= max(1024, piece_bytes)


def test_every_call_is_a_contact_with_a_number() -> None:
    backend = Counted()
    assert backend.last_contact is None
    backend.barrier()
    first = backend.last_contact
    assert first is not None
    backend.all_reduce(1.0)
    last = backend.last_contact
    assert last is not None
    assert (first.text, last.text) == ("barrier()", "all_reduce(float, op='sum')")
    assert last.number > first.number
    assert last.ended is not None
    assert first.began <= last.began <= last.ended


def test_a_broken_network_is_an_error_that_every_rank_shares() -> None:
    backend = Counted()
    backend.is_broken = True
    backend.hurry()  # no rank has reported a failure, and none is waited for
    with pytest.raises(BackendError, match=r"rank 0 of 1 lost its peers in barrier\(\): .* connection reset") as error:
        backend.barrier()
    assert is_shared(error.value)
    assert backend.last_contact is not None
    assert backend.last_contact.ended is None


def test_a_reported_failure_is_raised_in_place_of_the_networks_error() -> None:
    backend = Counted()
    backend.is_broken = True
    collect = backend.start_any(False)
    backend.fail(RemoteError(3, "OSError: out of memory"))
    for call in (collect, backend.barrier):  # under way as the failure came, and after it
        with pytest.raises(RemoteError, match="rank 3 failed: OSError: out of memory") as failure:
            call()
        assert is_shared(failure.value)


def test_the_error_of_a_body_is_raised_even_if_the_network_breaks() -> None:
    backend = Counted()
    backend.hurry()
    with pytest.raises(KeyError, match="own"), backend.agree("building"):
        backend.is_broken = True
        raise KeyError("own")


def test_an_error_that_all_ranks_have_is_not_exchanged_again() -> None:
    backend = Counted()
    with pytest.raises(KeyError), backend.agree("outer"), backend.agree("inner"):
        raise KeyError("once")
    assert len(backend.gathered_bytes) == 1


def test_a_value_that_cannot_be_pickled_is_refused_with_the_reason() -> None:
    class Stubborn:
        def __reduce__(self) -> str:
            raise OSError("not today")

    with pytest.raises(TypeError, match="collectives take tensors and picklable values, got Stubborn: not today") as no:
        Counted().all_gather(Stubborn())
    assert isinstance(no.value.__cause__, OSError)
