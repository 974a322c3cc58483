"""The command before its ranks are connected. What it does afterwards is in integration/, by real commands."""

import os
from pathlib import Path

import pytest

from disttrain import launch
from disttrain.errors import BackendError


@pytest.mark.parametrize("of_the_users", [None, ":16:8"])
def test_cublas_has_its_workspace_before_connecting_starts_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], of_the_users: str | None
) -> None:
    seen = []

    def connect(name: str, *, timeout_s: float, spmd: bool | None) -> None:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise BackendError("no ranks here")

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", of_the_users or "")
    if of_the_users is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(launch, "connect", connect)
    assert launch.main([str(Path(__file__).parents[1] / "examples" / "digits.py")]) == launch.FAILED
    assert seen == [of_the_users or ":4096:8"]
    assert capsys.readouterr().err == "BackendError: no ranks here\n"
