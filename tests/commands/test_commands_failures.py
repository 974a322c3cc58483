"""The error that ended a run is printed once, with the exit code that all ranks take."""

import argparse
from pathlib import Path

import pytest
import torch

from disttrain.backend import Backend
from disttrain.backend.single import SingleBackend
from disttrain.commands.failures import is_interrupted, print_error, report_failure
from disttrain.config import load_config
from disttrain.errors import CodeError, ConfigError, DataError, Interrupted, RemoteError
from disttrain.pod import TERMINATION_LOG

QUIET, WITH_TRACEBACK = argparse.Namespace(traceback=False), argparse.Namespace(traceback=True)


@pytest.fixture
def backend() -> Backend:
    return SingleBackend(torch.device("cpu"))


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ConfigError("seed: a"), 2, "ConfigError: seed: a\n"),
        (DataError("empty"), 2, "DataError: empty\n"),
        (CodeError("cfg.py:7 in forward: KeyError: 'x'"), 2, "CodeError: cfg.py:7 in forward: KeyError: 'x'\n"),
        (PermissionError("no"), 1, "PermissionError: no\n"),
        (Interrupted("SIGTERM came"), 75, "Interrupted: SIGTERM came\n"),
    ],
)
def test_an_error_for_a_person_is_one_line(
    error: BaseException,
    code: int,
    printed: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(TERMINATION_LOG, str(tmp_path / "log"))
    assert print_error(error, QUIET) == code
    assert capsys.readouterr().err == printed
    assert (tmp_path / "log").read_text() == printed.rstrip()


def test_a_pod_without_the_rank_that_failed_says_which_it_was(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TERMINATION_LOG, str(tmp_path / "log"))
    assert report_failure(RemoteError(3, "CodeError: cfg.py:7"), None, backend, QUIET) == 2
    assert (tmp_path / "log").read_text() == "rank 3 failed: CodeError: cfg.py:7"


def test_a_defect_keeps_its_traceback_and_the_option_prints_every_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_error(KeyError("ours"), QUIET) == 1
    assert capsys.readouterr().err == "KeyError: 'ours'\n"  # as Python prints an error that was never raised
    cause = CodeError("told in one line")
    cause.__cause__ = ValueError("the origin")
    assert print_error(cause, WITH_TRACEBACK) == 2
    assert "ValueError: the origin\n\nThe above exception was the direct cause" in capsys.readouterr().err


def test_a_mistake_is_explained_before_it_is_reported(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(Path(__file__).parents[2] / "examples" / "digits.py")

    def forward() -> None:
        raise ValueError("three channels, not four")

    try:
        with backend.agree("a step"):  # the package calls what the user wrote
            forward()
    except ValueError as raised:
        error = raised
    assert report_failure(error, config, backend, QUIET) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("CodeError: ")
    line_number = forward.__code__.co_firstlineno + 1
    assert line.endswith(f"failures.py:{line_number} in forward: ValueError: three channels, not four")
    failure = backend.first_failure(wait_s=0.0)
    assert failure is not None
    assert failure.failed_exit_code == 2  # what the other ranks take


def test_a_rank_takes_the_code_of_the_rank_that_explained_its_error(
    backend: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    backend.fail(RemoteError(1, "CodeError: cfg.py:7 in forward: ValueError: no"))
    assert report_failure(RemoteError(1, "ValueError: no"), None, backend, QUIET) == 2
    assert capsys.readouterr().err == ""


def test_a_signal_to_another_rank_counts(backend: Backend) -> None:
    assert not is_interrupted(RuntimeError("the network's own"), backend)
    assert is_interrupted(RemoteError(1, "Interrupted: SIGTERM"), backend)
    assert is_interrupted(Interrupted("SIGTERM"), backend)
