"""`launch` before its ranks are connected; integration/ tests the rest by real commands."""

import os
import threading
from pathlib import Path

import pytest

from disttrain.commands import launch
from disttrain.config import load_config
from disttrain.errors import BackendError


@pytest.mark.parametrize("of_the_users", [None, ":16:8"])
def test_cublas_has_its_workspace_before_connecting_starts_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], of_the_users: str | None
) -> None:
    values = []

    def connect(name: str, *, timeout_s: float, spmd: bool | None) -> None:
        values.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise BackendError("no ranks here")

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", of_the_users or "")
    if of_the_users is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(launch, "connect", connect)
    assert launch.main([str(Path(__file__).parents[2] / "examples" / "digits.py")]) == launch.FAILED
    assert values == [of_the_users or ":4096:8"]
    assert capsys.readouterr().err == "BackendError: no ranks here\n"


@pytest.mark.parametrize(
    ("fields", "asks"),
    [
        ([], False),
        (["backend=xla", "spmd=true"], True),
        (["strategy=fsdp"], None),  # only if the backend is that of XLA devices
        (["strategy=fsdp", "spmd=true"], True),
    ],
)
def test_one_rank_drives_all_xla_devices_if_the_config_asks_for_it(fields: list[str], asks: bool | None) -> None:
    config = load_config(Path(__file__).parents[2] / "examples" / "digits.py", fields)
    assert launch.asks_spmd(config) is asks
    assert launch.asks_spmd(None) is False


@pytest.mark.parametrize(("words", "code"), [([], launch.FAILED), (["modle=3"], launch.USAGE)])
def test_a_launch_from_a_thread_returns_its_code(words: list[str], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(name: str, *, timeout_s: float, spmd: bool | None) -> None:
        raise BackendError("no ranks here")

    monkeypatch.setattr(launch, "connect", connect)
    codes: list[int] = []

    def run() -> None:
        with pytest.warns(RuntimeWarning, match="started in a thread"):
            codes.append(launch.main([str(Path(__file__).parents[2] / "examples" / "digits.py"), *words]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [code]
