"""A checkpoint has the values that its run logged at that step, to the last bit, on one rank or on several."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from small_run import console, net, points, single, small_config, small_run, trained
from torch import Tensor, nn

from disttrain.backend import Backend
from disttrain.checkpoint import store_at
from disttrain.engine import Engine, Events
from disttrain.errors import CheckpointError, ConfigError
from disttrain.run.checkpoint_values import CheckpointValues, chosen, evaluate_checkpoint
from disttrain.run.directory import RunDirectory
from disttrain.run.evaluation import Evaluation
from disttrain.run.state import Run
from disttrain.run.validation_sets import ValidationSets

SETS = {"clean": partial(points, 12), "noisy": partial(points, 7)}


class Sampling(nn.Module):
    """Samples, and counts, also when it is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1.0  # type: ignore[misc, operator]
        return self.inner(x) + 0.1 * torch.randn(len(x), 1) * self.calls  # type: ignore[no-any-return, operator]


class Apart(torch.optim.SGD):
    """Evaluates at twice the weights that it trains, as a schedule-free optimizer evaluates elsewhere."""

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(2.0)

    def train(self) -> None:
        """Come back; the run itself restores the bits."""


def averages(trainer: Engine, run: Run) -> None:
    """Keep an average of the weights, and evaluate with it (a model of its own reads it)."""
    average = run.keep("average", nn.Linear(3, 4))

    def update() -> None:
        with torch.no_grad():
            average.weight.lerp_(run.model[0].weight, 0.5)  # type: ignore[index]

    trainer.add_event_handler(Events.ITERATION_COMPLETED, update)


def frozen() -> nn.Module:
    model = net()
    model[0].requires_grad_(False)  # type: ignore[index]
    return model


def evaluated(folder: Path, step: int, data: str | None = None, **changes: Any) -> CheckpointValues:
    directory = RunDirectory(folder / "small")
    name, store = f"step-{step:08}", store_at(folder / "small" / "checkpoints")
    try:
        return evaluate_checkpoint(small_config(**changes), single(), directory, store, name, data, console())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": Sampling},
        {"optimizer": partial(Apart, lr=0.05)},
        {"handlers": [averages], "precision": "bf16"},
        {"model": frozen, "checkpoint": {"leave_out_frozen": True}},
        {"valid_data": SETS, "validate": {"batch_size": 5}, "strategy": "fsdp"},
    ],
    ids=["plain", "sampling", "two_points", "kept_bf16", "left_out", "sets_fsdp"],
)
def test_the_values_are_those_that_the_run_logged(tmp_path: Path, changes: dict[str, Any]) -> None:
    trained(tmp_path, **changes)
    lines = [json.loads(line) for line in (tmp_path / "small" / "metrics" / "valid.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8]
    for line in lines:
        found = evaluated(tmp_path, line["step"], **changes)
        logged = {name: value for name, value in line.items() if name not in ("step", "epoch")}
        assert found == CheckpointValues(line["step"], logged, logged)
        assert found.differing == []


def test_it_changes_nothing_even_while_the_run_holds_its_directory(tmp_path: Path) -> None:
    trained(tmp_path)
    run = tmp_path / "small"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    holder = RunDirectory(run)
    holder.lock()
    held = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert evaluated(tmp_path, 8).differing == []
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == held
    assert before.keys() == held.keys()
    holder.close()


def test_a_step_without_an_evaluation_and_other_data_are_told(tmp_path: Path) -> None:
    size = [12]

    def data() -> Any:
        return points(size[0])

    trained(tmp_path, valid_data=data, checkpoint={"every_steps": 2})
    assert evaluated(tmp_path, 6, valid_data=data, checkpoint={"every_steps": 2}).logged is None
    size[0] = 6
    found = evaluated(tmp_path, 8, valid_data=data)
    assert found.differing == ["loss"]
    assert found.logged is not None
    assert found.logged != found.values


def test_one_set_alone(tmp_path: Path) -> None:
    trained(tmp_path, valid_data=SETS)
    found = evaluated(tmp_path, 8, "noisy", valid_data=SETS)
    assert list(found.values) == ["noisy/loss"]
    assert found.differing == []
    evaluation = small_run(tmp_path / "other", valid_data=SETS).evaluation
    assert isinstance(evaluation, ValidationSets)
    with pytest.raises(ConfigError, match="--data nosy: expected one of clean, noisy"):
        chosen(evaluation, "nosy")
    alone = small_run(tmp_path / "alone").evaluation
    assert isinstance(alone, Evaluation)
    assert chosen(alone, None) is alone
    with pytest.raises(ConfigError, match="--data clean: expected none, for the run's validation data has no sets"):
        chosen(alone, "clean")
    with pytest.raises(ConfigError, match="whose config has no valid_data"):
        chosen(None, None)


def test_the_checkpoint_of_another_run_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ConfigError, match="is of a run with other settings: seed=5 in the checkpoint, 6 here"):
        evaluated(tmp_path, 8, seed=6)
    (tmp_path / "small" / "checkpoints" / "step-00000008" / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-00000008 is damaged: tensors\.safetensors has 0 bytes"):
        evaluated(tmp_path, 8)
    assert (tmp_path / "small" / "checkpoints" / "step-00000008").is_dir()


def on_a_rank(backend: Backend, folder: Path, strategy: str) -> CheckpointValues:
    config = small_config(model=Sampling, num_slots=4, strategy=strategy, valid_data=SETS, validate={"batch_size": 2})
    store = store_at(folder / "small" / "checkpoints")
    directory = RunDirectory(folder / "small")
    return evaluate_checkpoint(config, backend, directory, store, "step-00000004", None, console())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_loss_has_the_same_bits_on_three_ranks(tmp_path: Path, ranks: Ranks, strategy: str) -> None:
    trained(tmp_path, model=Sampling, num_slots=4, valid_data=SETS, validate={"batch_size": 2}, max_epochs=1)
    for found in ranks(3, on_a_rank, tmp_path, strategy):
        assert found.differing == []
        assert found.logged is not None
