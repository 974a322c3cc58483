"""Mistakes are told from failures that may pass, by the exceptions that torch and Python really raise."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from disttrain import mistakes
from disttrain.mistakes import is_mistake, is_of_disttrain, is_of_user, line_of, may_pass, placed, quoted, shown_path


def raised(function: Callable[[], object]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def from_a_file() -> None:
    try:
        Path("/no/such/file").read_text()
    except OSError:
        raise ValueError("the sample cannot be decoded")  # noqa: B904 - the context counts too


REAL_MISTAKES: list[Callable[[], object]] = [
    lambda: nn.Linear(3, 4)(torch.zeros(2, 5)),
    lambda: nn.Linear(3, 4)(torch.zeros(2, 3, dtype=torch.float64)),
    lambda: nn.CrossEntropyLoss()(torch.zeros(2, 3), torch.tensor([0, 3])),
    lambda: nn.Embedding(3, 2)(torch.tensor([3])),
    lambda: nn.Conv2d(3, 4, 2)(torch.zeros(1, 2, 8, 8)),
    lambda: torch.stack([torch.zeros(2), torch.zeros(3)]),
    lambda: torch.zeros(4).view(3),
    lambda: torch.zeros(3).sum().backward(),
    lambda: torch.zeros(3, requires_grad=True).exp().backward(),
    lambda: torch.zeros(2, 3) + torch.zeros(2, 4),
    lambda: torch.zeros(3, device="meta") + torch.zeros(3),
    lambda: bool(torch.zeros(2)),
    lambda: {}["label"],
    lambda: torch.zeros(2)[2],
    lambda: 1 / 0,
    lambda: "x".nonsense,  # type: ignore[attr-defined]
    lambda: int("many"),
    lambda: __import__("no_such_module"),
]


@pytest.mark.parametrize("function", REAL_MISTAKES, ids=lambda function: str(function.__code__.co_firstlineno))
def test_a_mistake_of_shapes_types_and_names_comes_again(function: Callable[[], object]) -> None:
    error = raised(function)
    assert is_mistake(error), repr(error)
    assert not may_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        raised(lambda: Path("/no/such/file").read_text()),
        raised(from_a_file),
        raised(lambda: json.loads("{")),
        raised(lambda: b"\xff".decode()),
        ConnectionResetError("by peer"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a tensor of size 3"),
        RuntimeError("CUDA error: device-side assert triggered; tensor of shape [3]"),
        RuntimeError("[gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:2111: Connection reset by peer"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] not enough memory: you tried to allocate tensor of size 8"),
        RuntimeError("can't start new thread"),
        RuntimeError("DataLoader worker (pid 12) is killed by signal: tensor"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED for input of size 3"),
    ],
    ids=quoted,
)
def test_what_comes_from_files_memory_devices_and_peers_may_pass(error: Exception) -> None:
    assert may_pass(error)
    assert not is_mistake(error)


def test_a_tensor_on_another_device_is_a_mistake_though_it_names_cuda() -> None:
    text = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
    assert is_mistake(RuntimeError(text))


@pytest.mark.parametrize("error", [Exception("of the user's own kind"), RuntimeError("the service said no")])
def test_nothing_is_known_of_other_errors(error: Exception) -> None:
    assert not is_mistake(error)
    assert not may_pass(error)


def test_a_cycle_of_causes_ends() -> None:
    first, second = ValueError("a"), KeyError("b")
    first.__cause__, second.__cause__ = second, first
    assert is_mistake(first)


@given(st.text(), st.sampled_from([ValueError, OSError, RuntimeError]))
def test_a_quote_is_one_line_that_is_not_too_long(text: str, kind: type[Exception]) -> None:
    quote = quoted(kind(text))
    assert len(quote.splitlines()) == 1
    assert quote.startswith(kind.__name__)
    assert len(quote) <= len(kind.__name__) + 2 + mistakes.LONGEST_QUOTE + 3


def test_the_place_is_the_innermost_line_of_the_users_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_torch() -> object:
        return nn.Linear(3, 4)(torch.zeros(2, 5))

    line = in_torch.__code__.co_firstlineno + 1
    monkeypatch.chdir(Path(__file__).parent)
    place = f"{os.path.basename(__file__)}:{line} in in_torch"
    assert line_of(raised(in_torch)) == place
    assert placed(raised(in_torch)).endswith(f"(2x5 and 3x4) ({place})")
    monkeypatch.chdir(tmp_path)
    assert line_of(raised(in_torch)) == f"{__file__}:{line} in in_torch"
    assert shown_path(str(tmp_path / "a" / "cfg.py")) == "a/cfg.py"


def test_an_error_without_a_line_of_the_user_has_no_place() -> None:
    assert line_of(ValueError("never raised")) is None
    assert placed(ValueError("never raised")) == "ValueError: never raised"


def test_libraries_are_no_files_of_the_user() -> None:
    for file in (torch.__file__, json.__file__, pytest.__file__, mistakes.__file__, "<frozen runpy>"):
        assert not is_of_user(file), file
    assert is_of_user(__file__)
    assert is_of_disttrain(mistakes.__file__)
    assert not is_of_disttrain(__file__)
