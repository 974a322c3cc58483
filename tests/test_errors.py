"""Errors keep their facts on the way between processes, and a program may catch them as Python's own."""

import inspect
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain import errors
from disttrain.backend.headers import describe_error
from disttrain.data.dataset import LoadingError, SampleError
from disttrain.errors import (
    BackendError,
    CheckpointError,
    CodeError,
    ConfigError,
    DamagedError,
    DataError,
    DisttrainError,
    FaultyRank,
    HangError,
    Interrupted,
    LeftOutError,
    NonFiniteError,
    OutOfMemory,
    RemoteError,
    RunIsOverError,
    TooFewLeftError,
)


@pytest.mark.parametrize(
    ("error", "own"),
    [
        (BackendError, RuntimeError),
        (CheckpointError, RuntimeError),
        (CodeError, RuntimeError),
        (ConfigError, ValueError),
        (DamagedError, CheckpointError),
        (DataError, RuntimeError),
        (FaultyRank, RuntimeError),
        (HangError, RuntimeError),
        (LeftOutError, RuntimeError),
        (NonFiniteError, RuntimeError),
        (OutOfMemory, MemoryError),
        (RemoteError, RuntimeError),
        (RunIsOverError, LeftOutError),
        (TooFewLeftError, RuntimeError),
    ],
)
def test_an_error_for_a_person_is_also_one_of_pythons_own(error: type[Exception], own: type[Exception]) -> None:
    assert issubclass(error, DisttrainError)
    assert issubclass(error, own)


def test_every_error_of_the_module_is_in_the_table_above() -> None:
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    (mark,) = test_an_error_for_a_person_is_also_one_of_pythons_own.pytestmark  # type: ignore[attr-defined]
    assert classes == {error.__name__ for error, _ in mark.args[1]} | {"DisttrainError", "Interrupted"}


def test_except_exception_does_not_catch_a_signal() -> None:
    with pytest.raises(Interrupted):
        try:
            raise Interrupted("SIGTERM")
        except Exception as error:
            raise AssertionError("a signal was caught") from error
    assert issubclass(Interrupted, KeyboardInterrupt)
    assert Interrupted.exit_code == 75  # EX_TEMPFAIL of sysexits.h


@given(st.integers(0, 10**6), st.text())
def test_a_remote_error_survives_pickling(rank: int, message: str) -> None:
    error = RemoteError(rank, message)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.rank, again.message, str(again)) == (RemoteError, rank, message, str(error))
    assert str(again) == f"rank {rank} failed: {message}"


def test_a_remote_error_knows_whether_a_signal_ended_the_other_rank() -> None:
    assert RemoteError(1, describe_error(Interrupted("SIGTERM"))).interrupted
    assert not RemoteError(1, describe_error(KeyboardInterrupt())).interrupted
    assert not RemoteError(1, describe_error(ValueError("Interrupted: no"))).interrupted


def test_a_non_finite_error_has_the_step_and_the_reason() -> None:
    error = NonFiniteError("the loss of step 7 is nan", step=7, reason="loss is nan")
    assert (str(error), error.step, error.reason) == ("the loss of step 7 is nan", 7, "loss is nan")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a"), 2),
        (CodeError("cfg.py:7 in forward: KeyError: 'x'"), 2),
        (DataError("empty"), 2),
        (SampleError("dataset[4] raised ValueError: bad"), 2),
        (LoadingError("dataset[4] raised OSError: torn"), 1),
        (CheckpointError("no permission"), 1),
        (Interrupted("SIGTERM"), 75),
        (ValueError("ConfigError: no"), 1),
    ],
)
def test_all_ranks_take_the_exit_code_of_the_rank_that_failed(error: BaseException, code: int) -> None:
    assert RemoteError(1, describe_error(error)).failed_exit_code == code
