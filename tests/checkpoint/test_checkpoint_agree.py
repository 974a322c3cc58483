"""An action on one rank or on every rank has one outcome for all: the same result, or an error on each."""

import pytest
import torch
from ranks import Ranks

from disttrain.backend import Backend
from disttrain.checkpoint import DamagedError, on_one_rank
from disttrain.checkpoint.agree import by_rank, on_every_rank
from disttrain.errors import CheckpointError, RemoteError


def fail(error: Exception) -> None:
    raise error


def share_outcomes(backend: Backend) -> None:
    assert on_one_rank(backend, lambda: backend.rank * 10 + 5, rank=1) == 15
    with pytest.raises(ValueError if backend.rank == 1 else RemoteError, match="its own text"):
        on_one_rank(backend, lambda: fail(ValueError("its own text")), rank=1)
    with pytest.raises(DamagedError, match=r"^bad$"):
        on_every_rank(backend, lambda: fail(DamagedError("bad")) if backend.rank else None)
    mixed = CheckpointError("unknown") if backend.rank else DamagedError("a first one")
    with pytest.raises(CheckpointError, match=r"^unknown$") as caught:
        on_every_rank(backend, lambda: fail(mixed))
    assert type(caught.value) is CheckpointError
    assert on_every_rank(backend, lambda: backend.rank) == backend.rank
    assert by_rank(backend, lambda: backend.rank * 10) == [0, 10]
    for wrong, kind in ((CheckpointError("mine"), CheckpointError), (ValueError("mine"), RemoteError)):
        with pytest.raises(type(wrong) if backend.rank else kind, match="mine"):
            by_rank(backend, lambda wrong=wrong: fail(wrong) if backend.rank else None)
    with pytest.raises(CheckpointError, match=r"^0$"):  # the error of the lowest rank, if several fail
        by_rank(backend, lambda: fail(CheckpointError(str(backend.rank))))


def fail_without_words(backend: Backend) -> str:
    """Return the error of rank 1, as this rank raises it."""
    with pytest.raises((KeyError, RemoteError)) as caught:
        by_rank(backend, lambda: fail(KeyError()) if backend.rank else None)
    return repr(caught.value)


def test_every_rank_has_the_same_outcome(ranks: Ranks) -> None:
    ranks(2, share_outcomes)


def test_an_error_without_a_message_keeps_its_type_in_words(ranks: Ranks) -> None:
    for error in ranks(2, fail_without_words):
        assert "KeyError()" in error


def test_one_process_alone_has_its_own_outcome() -> None:
    assert on_one_rank(None, lambda: 5) == 5
    assert by_rank(None, lambda: 5) == [5]
    assert torch.equal(on_every_rank(None, lambda: torch.ones(2)), torch.ones(2))
    for helper in (on_one_rank, by_rank, on_every_rank):
        with pytest.raises(DamagedError, match="own"):
            helper(None, lambda: fail(DamagedError("own")))
