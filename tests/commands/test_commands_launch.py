"""`launch` before its ranks are connected; integration/ tests the rest by real commands."""

import os
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from disttrain.commands import launch
from disttrain.config import Config, EarlyStopConfig, load_config, replace
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


def test_a_run_that_its_own_code_ended_is_finished_for_the_length_that_it_had() -> None:
    ended = {"status": "completed", "step": 4, "epoch": 1, "terminated": {"max_epochs": 3, "max_steps": None}}
    config = Config(
        name="ended",
        model=lambda: nn.Linear(1, 1),
        train_data=list,
        loss=nn.MSELoss(),
        optimizer=torch.optim.SGD,
        global_batch_size=2,
        max_epochs=3,
    )
    for max_epochs, finished in ((3, True), (1, False), (5, False)):
        assert launch.is_finished(ended, replace(config, max_epochs=max_epochs)) == finished
    plain = {name: value for name, value in ended.items() if name != "terminated"}
    assert launch.is_finished(plain, replace(config, max_epochs=1))
    assert not launch.is_finished(plain, replace(config, max_epochs=3))


def test_a_run_that_was_ended_early_is_finished_under_the_rule_that_ended_it() -> None:
    rule = EarlyStopConfig(monitor="loss", patience=2)
    ended = {"status": "completed", "step": 4, "epoch": 1, "stopped": "early: ...", "early_stop": rule.model_dump()}
    config = Config(
        name="ended",
        model=lambda: nn.Linear(1, 1),
        train_data=list,
        valid_data=list,
        loss=nn.MSELoss(),
        optimizer=torch.optim.SGD,
        global_batch_size=2,
        max_epochs=3,
        early_stop=rule,
    )
    assert launch.is_finished(ended, config)
    assert launch.is_finished(ended, replace(config, max_epochs=30))
    assert not launch.is_finished(ended, replace(config, early_stop={"monitor": "loss", "patience": 3}))
    assert not launch.is_finished(ended, replace(config, early_stop={"monitor": None}))
    one_epoch = replace(config, early_stop={"monitor": None}, max_epochs=1)
    assert launch.is_finished({**ended, "epoch": 2}, one_epoch)
    assert not launch.is_finished(ended, one_epoch)  # it may have ended inside that epoch
