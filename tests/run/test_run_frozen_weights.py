"""Checkpoints leave frozen weights out if a run can build them again; a resumed run has the same bits or is refused."""

import hashlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankFailure, Ranks
from small_run import console, points, printed, small_config, small_run, trained
from torch import nn

from disttrain.backend import Backend
from disttrain.checkpoint import export, load
from disttrain.engine import Engine, Events
from disttrain.errors import ConfigError
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.frozen_weights import LEFT_OUT
from disttrain.run.state import Run
from disttrain.run.train import train

Handler = Callable[[Engine, Run], None]
BACKBONE = ["model.0.weight", "model.0.bias", "model.1.weight", "model.1.bias"]


VARIANT = {"shift": 0.0, "headless": False}
"""What somebody has edited in the functions of the cfg.py, whose names stay the same."""


def body() -> nn.Module:
    """Return a frozen backbone (with a BatchNorm, whose buffers move) and a head."""
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    model[:2].requires_grad_(False)
    with torch.no_grad():
        model[0].bias.add_(VARIANT["shift"])  # type: ignore[operator, union-attr]
    return nn.Sequential(nn.Flatten(), nn.Flatten(), nn.Linear(3, 1)) if VARIANT["headless"] else model


CHANGES: dict[str, Any] = {
    "model": body,
    "train_data": partial(points, 48),
    "optimizer": partial(torch.optim.AdamW, lr=0.01),
    "global_batch_size": 12,
    "num_slots": 6,
    "max_epochs": 3,
    "ledger": {"every_steps": 1},
    "checkpoint": {"every_steps": 2, "leave_out_frozen": True},
}


def ledger(folder: Path) -> str:
    return (folder / "small" / "ledger.jsonl").read_text()


def saved(folder: Path, step: int) -> tuple[set[str], list[str]]:
    """Return the names of the model's tensors in a checkpoint, and those that it says it leaves out."""
    found = load(folder / "small" / "checkpoints" / f"step-{step:08}")
    return set(found.state["model"]), list(found.manifest.position.get(LEFT_OUT, ()))


def test_frozen_weights_are_left_out_and_the_bits_are_the_same(tmp_path: Path) -> None:
    plain = {**CHANGES, "checkpoint": {"every_steps": 2}}
    whole = trained(tmp_path / "whole", **plain)
    assert saved(tmp_path / "whole", 12)[1] == []
    for epochs in (1, 2, 3):
        parts = trained(tmp_path / "parts", **(CHANGES | {"max_epochs": epochs}))
    names, left_out = saved(tmp_path / "parts", 12)
    assert left_out == BACKBONE
    assert names == {"1.running_mean", "1.running_var", "1.num_batches_tracked", "2.weight", "2.bias"}
    assert ledger(tmp_path / "parts") == ledger(tmp_path / "whole")
    assert parts["params_sha256"] == whole["params_sha256"]
    exported = export(tmp_path / "parts" / "small" / "checkpoints" / "step-00000012", tmp_path / "adapter.safetensors")
    assert (exported.num_tensors, exported.num_left_out) == (5, 4)


def test_it_may_be_switched_on_and_off_between_launches(tmp_path: Path) -> None:
    trained(tmp_path / "whole", **CHANGES)
    for epochs, leaves_out in ((1, True), (2, False), (3, True)):
        every = {"every_steps": 4, "leave_out_frozen": leaves_out}
        trained(tmp_path / "parts", **(CHANGES | {"max_epochs": epochs, "checkpoint": every}))
        assert saved(tmp_path / "parts", 4 * epochs)[1] == BACKBONE * leaves_out
    assert ledger(tmp_path / "parts") == ledger(tmp_path / "whole")


def thaws(trainer: Engine, run: Run) -> None:
    """Train the backbone's first layer in the second epoch, and freeze it again."""

    def thaw() -> None:
        run.model[0].requires_grad_(True)  # type: ignore[index]
        run.optimizer.add_param_group({"params": run.model[0].parameters()})  # type: ignore[index]

    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), thaw)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda: run.model[0].requires_grad_(False))  # type: ignore[index]


def freezes(trainer: Engine, run: Run) -> None:
    """Freeze the head, which was trained, from the second epoch on, and train the backbone instead."""

    def freeze() -> None:
        run.model[2].requires_grad_(False)  # type: ignore[index]
        run.model[0].requires_grad_(True)  # type: ignore[index]
        run.optimizer.add_param_group({"params": run.model[0].parameters()})  # type: ignore[index]

    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), freeze)


def moves(trainer: Engine, run: Run) -> None:
    """Move a frozen weight behind autograd's back, as code for a momentum teacher does; here only its signs."""
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda: run.model[0].bias.data.neg_())  # type: ignore[index]


@pytest.mark.parametrize(
    ("handler", "left_out"),
    [
        (thaws, {4: BACKBONE, 6: BACKBONE[2:], 12: BACKBONE[2:]}),
        pytest.param(freezes, {4: BACKBONE, 6: BACKBONE[2:], 12: BACKBONE[2:]}, marks=pytest.mark.slow),
        (moves, {4: BACKBONE, 6: [BACKBONE[0], *BACKBONE[2:]], 12: [BACKBONE[0], *BACKBONE[2:]]}),
    ],
)
def test_what_has_changed_is_saved(tmp_path: Path, handler: Handler, left_out: dict[int, list[str]]) -> None:
    changes = {**CHANGES, "handlers": [handler], "checkpoint": {**CHANGES["checkpoint"], "keep": 9}}
    trained(tmp_path / "whole", **changes)
    for step in (4, 6, 7, 12):
        length = {"max_epochs": None, "max_steps": step}
        trained(tmp_path / "parts", **(changes | length))
    assert ledger(tmp_path / "parts") == ledger(tmp_path / "whole")
    for step, names in left_out.items():
        assert saved(tmp_path / "parts", step)[1] == saved(tmp_path / "whole", step)[1] == names


def test_other_frozen_weights_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path, **(CHANGES | {"max_epochs": 1}))
    bias = small_run(tmp_path / "new", **CHANGES).model[0].bias.detach()  # type: ignore[index, union-attr, operator]
    monkeypatch.setitem(VARIANT, "shift", 1.0)
    with pytest.raises(ConfigError) as caught:
        trained(tmp_path, **CHANGES)
    first = hashlib.sha256(b"float32 [8]\n" + bias.numpy().tobytes()).hexdigest()
    assert str(caught.value).startswith(
        "the checkpoint leaves frozen weights out, and 0.bias is not the tensor with which the run began (sha256 "
        f"{first[:12]}), but "
    )
    assert "model, init_from and handlers must give the same weights" in str(caught.value)
    monkeypatch.setitem(VARIANT, "headless", True)
    with pytest.raises(ConfigError, match=r"0\.weight is not .* but missing, and so with 3 more:"):
        trained(tmp_path, **CHANGES)


class Teacher(nn.Module):
    """A loss that is a Module with a frozen teacher."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.teacher = nn.Linear(1, 1).requires_grad_(False)

    def forward(self, y_pred: Any, y: Any) -> Any:
        return (y_pred - self.teacher(y)).square().mean()


def test_a_frozen_teacher_in_the_loss(tmp_path: Path) -> None:
    changes = {**CHANGES, "loss": Teacher()}
    trained(tmp_path / "whole", **changes)
    trained(tmp_path / "parts", **(changes | {"max_epochs": 1}))
    trained(tmp_path / "parts", **changes)
    assert saved(tmp_path / "parts", 12)[1] == [*BACKBONE, "loss.teacher.weight", "loss.teacher.bias"]
    assert ledger(tmp_path / "parts") == ledger(tmp_path / "whole")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(11)
    torch.save(body().state_dict(), tmp_path / "base.pt")
    return tmp_path / "base.pt"


def test_the_frozen_weights_of_init_from_are_taken_again_on_resume(tmp_path: Path, base: Path) -> None:
    changes = {**CHANGES, "init_from": {"path": base, "skip": "2."}}
    trained(tmp_path / "whole", **changes)
    trained(tmp_path / "parts", **(changes | {"max_epochs": 1}))
    to = console()
    trained(tmp_path / "parts", to, **(changes | {"max_epochs": 2}))
    assert "begins with" not in printed(to)
    assert "WARNING" not in printed(to)
    moved = base.rename(tmp_path / "moved.pt")
    with pytest.raises(ConfigError, match=r"base\.pt.*The run's checkpoints leave frozen weights out, which come from"):
        trained(tmp_path / "parts", **changes)
    trained(tmp_path / "parts", **(changes | {"init_from": {"path": moved, "skip": "2."}}))
    assert ledger(tmp_path / "parts") == ledger(tmp_path / "whole")
    torch.save(body().state_dict(), moved)
    with pytest.raises(ConfigError, match=r"0\.weight is not the tensor with which the run began"):
        trained(tmp_path / "parts", **(changes | {"init_from": {"path": moved, "skip": "2."}, "max_epochs": 4}))


def test_the_same_step_of_a_source_that_went_on(tmp_path: Path) -> None:
    free = {**CHANGES, "checkpoint": {"every_steps": 4, "keep": 9}, "model": lambda: body().requires_grad_(True)}
    trained(tmp_path / "source", **(free | {"max_epochs": 1}))
    changes = {**CHANGES, "init_from": tmp_path / "source" / "small"}
    first = trained(tmp_path / "parts", **(changes | {"max_epochs": 1}))
    trained(tmp_path / "source", **(free | {"max_epochs": 2}))
    assert trained(tmp_path / "parts", **changes)["init_from"] == first["init_from"]
    shutil.rmtree(tmp_path / "source" / "small" / "checkpoints" / "step-00000004")
    with pytest.raises(ConfigError, match="there is no checkpoint of step 4"):
        trained(tmp_path / "parts", **(changes | {"max_epochs": 4}))


def test_a_run_may_begin_with_a_run_that_leaves_them_out_if_it_has_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(tmp_path / "first", **(CHANGES | {"max_epochs": 1}))
    assert first["step"] == 4
    to = console()
    trained(tmp_path / "second", to, **(CHANGES | {"init_from": tmp_path / "first" / "small"}))
    assert "step 4: 9 tensors taken" in printed(to)
    monkeypatch.setitem(VARIANT, "shift", 1.0)
    with pytest.raises(
        ConfigError, match=r"0\.bias is frozen there and not in its checkpoint, and another tensor here"
    ):
        trained(tmp_path / "third", **(CHANGES | {"init_from": tmp_path / "first" / "small"}))


def dies(trainer: Engine, run: Run) -> None:
    def die() -> None:
        raise InterruptedError("dies in step 8")

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=8), die)


def live(backend: Backend, folder: Path, base: Path, strategy: str, deadly: bool, asynchronous: bool) -> str:
    config = small_config(
        **(CHANGES | {"checkpoint": {**CHANGES["checkpoint"], "asynchronous": asynchronous}}),
        strategy=strategy,
        init_from={"path": base, "skip": "2."},
        handlers=[thaws, *([dies] if deadly else [])],
    )
    to = console()
    with Preemption() as preemption:
        train(config, backend, RunDirectory(folder / "small"), to, preemption)
    return printed(to)


def live_with_others(backend: Backend, folder: Path, base: Path) -> None:
    live(backend, folder, base, "fsdp", False, False)


def test_killed_on_three_ranks_and_resumed_on_two(tmp_path: Path, base: Path, ranks: Ranks) -> None:
    trained(tmp_path / "whole", **CHANGES, init_from={"path": base, "skip": "2."}, handlers=[thaws])
    with pytest.raises(RankFailure, match="dies in step 8"):
        ranks(3, live, tmp_path, base, "fsdp", True, False, timeout_s=120)
    assert saved(tmp_path, 4)[1] == BACKBONE
    assert saved(tmp_path, 6)[1] == BACKBONE[2:]
    output = ranks(2, live, tmp_path, base, "ddp", False, True, timeout_s=120)[0]
    assert "resuming from step 6" in output
    assert ledger(tmp_path) == ledger(tmp_path / "whole")
    others = torch.load(base)
    others["1.bias"] += 1.0
    torch.save(others, base)
    outcomes = ranks.outcomes(2, live_with_others, tmp_path, base)
    errors = {f"{type(each.error).__name__} {each.error}" for each in outcomes}  # type: ignore[union-attr]
    assert len(errors) == 1
    assert errors.pop().startswith("ConfigError the checkpoint leaves frozen weights out, and 1.bias is not")
