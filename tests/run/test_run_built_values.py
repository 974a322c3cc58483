"""New values of an optimizer or a schedule, which the checkpoint's replace, are named; changes under way are not."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import console, printed, small_run, trained
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from disttrain.engine import Engine, Events
from disttrain.run.built_values import built_values
from disttrain.run.state import Run

settings: dict[str, Any] = {}
"""What the functions below use, as an edit of their bodies would change it."""


def sgd(parameters: Any) -> Optimizer:
    weights, *others = list(parameters)
    groups = [{"params": [weights], "lr": settings["lr"]}, {"params": others}]
    return SGD(groups, lr=0.1, momentum=settings.get("momentum", 0.0))


def adam(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=torch.tensor(settings["lr"]), betas=settings["betas"])


def steps(optimizer: Optimizer, total_steps: int) -> StepLR:
    return StepLR(optimizer, settings.get("step_size", 2), gamma=0.5)


def halving(trainer: Engine, run: Run) -> None:
    def halve() -> None:
        for group in run.optimizer.param_groups:
            group["lr"] *= 0.5

    trainer.add_event_handler(Events.ITERATION_COMPLETED, halve)


@pytest.fixture(autouse=True)
def _set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.settings", {"lr": 0.25, "betas": (0.9, 0.99)})


def resumed(folder: Path, optimizer: Callable[..., Any], edit: dict[str, Any], **changes: Any) -> str:
    """Train an epoch, edit the settings, train another one; return what it prints."""
    fields = {"optimizer": optimizer, "valid_data": None, **changes}
    trained(folder, max_steps=4, max_epochs=None, **fields)
    settings.update(edit)
    to = console()
    trained(folder, to, max_steps=4 if "schedule" in changes else 8, max_epochs=None, **fields)
    return printed(to)


def test_the_values_of_several_groups_and_tensors_are_plain(tmp_path: Path) -> None:
    values = built_values(small_run(tmp_path, optimizer=sgd))
    assert (values["optimizer"]["group 0: lr"], values["optimizer"]["group 1: lr"]) == (0.25, 0.1)
    assert values["schedule"] == {}
    adams = built_values(small_run(tmp_path, optimizer=adam, schedule=steps, max_epochs=1))
    assert (adams["optimizer"]["lr"], adams["optimizer"]["betas"]) == (0.25, [0.9, 0.99])
    assert adams["schedule"]["gamma"] == 0.5
    assert not {"params", "initial_lr"} & adams["optimizer"].keys()


def test_a_run_whose_config_builds_the_same_says_nothing(tmp_path: Path) -> None:
    out = resumed(tmp_path, sgd, {}, handlers=[halving])
    assert "resuming from step 4" in out
    assert "new values" not in out


def test_new_values_are_named_with_those_that_apply(tmp_path: Path) -> None:
    out = resumed(tmp_path, sgd, {"lr": 0.125, "momentum": 0.5})
    assert (
        "WARNING: new values in the config are not taken, for those of the checkpoint apply: "
        "optimizer group 0: lr=0.25 in the checkpoint, 0.125 in the config; "
        "optimizer group 0: momentum=0.0 in the checkpoint, 0.5 in the config; "
        "optimizer group 1: momentum=0.0 in the checkpoint, 0.5 in the config. Start anew with --fresh"
    ) in out


def test_the_values_that_apply_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", optimizer=sgd, max_epochs=2)
    trained(tmp_path / "cut", optimizer=sgd, max_epochs=1)
    settings["lr"] = 0.5
    assert trained(tmp_path / "cut", optimizer=sgd, max_epochs=2)["params_sha256"] == whole["params_sha256"]


def test_a_schedules_changes_are_no_new_values_and_its_new_settings_are(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"optimizer": sgd, "schedule": steps, "max_steps": 8, "max_epochs": None}
    ended = {"valid_data": None, "checkpoint": {"every_steps": 4}}
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, handlers=[stop_at_6], **fields, **ended)
    to = console()
    settings["step_size"] = 3
    trained(tmp_path, to, **fields, **ended)
    assert "apply: schedule step_size=2 in the checkpoint, 3 in the config. Start anew" in printed(to)
    assert "lr=" not in printed(to)


def stop_at_6(trainer: Engine, run: Run) -> None:
    def stop(engine: Engine) -> None:
        if engine.state.iteration == 6:
            raise KeyboardInterrupt

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)


def test_of_a_run_whose_beginning_nobody_noted_the_checkpoints_values_count(tmp_path: Path) -> None:
    trained(tmp_path, optimizer=sgd, max_epochs=1, valid_data=None)
    shutil.rmtree(tmp_path / "small" / "launches")
    settings["lr"] = 0.5
    for changes, expected in (({"handlers": [halving]}, False), ({}, True)):
        to = console()
        trained(tmp_path, to, optimizer=sgd, max_epochs=2 if changes else 3, valid_data=None, **changes)
        shutil.rmtree(tmp_path / "small" / "launches")
        assert ("in the checkpoint, 0.5 in the config" in printed(to)) == expected
