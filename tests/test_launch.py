"""The command before its ranks are connected. What it does afterwards is in integration/, by real commands."""

import os
from pathlib import Path

import pytest

from disttrain import launch
from disttrain.config import load_config
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


@pytest.mark.parametrize(
    ("fields", "asks"),
    [
        ([], False),
        (["backend=xla", "spmd=true"], True),
        (["strategy=fsdp"], None),  # on XLA devices, if the backend turns out to be theirs
        (["strategy=fsdp", "spmd=true"], True),
    ],
)
def test_one_rank_drives_all_xla_devices_where_the_config_asks_for_it(fields: list[str], asks: bool | None) -> None:
    config = load_config(Path(__file__).parents[1] / "examples" / "digits.py", fields)
    assert launch.asks_spmd(config) is asks
    assert launch.asks_spmd(None) is False
