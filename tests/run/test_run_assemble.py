"""The factories of a Config are called under seeds of their own, and their errors are named."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import net, points, small_run, trained
from torch import nn
from torchmetrics.regression import MeanSquaredError

from disttrain.engine import Engine, Events
from disttrain.errors import ConfigError
from disttrain.run.state import Run


def test_data_and_model_have_seeds_of_their_own(tmp_path: Path) -> None:
    drawn: dict[str, float] = {}

    def data() -> Any:
        drawn["data"] = torch.rand(()).item()
        return points()

    def model(extra: int) -> nn.Module:
        drawn["model"] = torch.rand(()).item()
        torch.rand(extra)
        return net()

    small_run(tmp_path, train_data=data, model=partial(model, 0))
    first = dict(drawn)
    torch.rand(7)
    small_run(tmp_path, train_data=data, model=partial(model, 3))
    assert drawn == first
    assert drawn["data"] != drawn["model"]
    small_run(tmp_path, train_data=data, seed=6)
    assert drawn["data"] != first["data"]


def broken(*_: Any) -> Any:
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize(
    ("changes", "factory"),
    [
        ({"train_data": broken}, "train_data"),
        ({"valid_data": broken}, "valid_data"),
        ({"model": broken}, "model"),
        ({"optimizer": broken}, "optimizer"),
        ({"schedule": broken}, "schedule"),
        ({"metrics": {"error": broken}}, "metric error"),
        ({"handlers": [broken]}, "handler broken"),
        ({"precision": broken}, "precision"),
    ],
)
def test_the_error_of_each_factory_is_named(tmp_path: Path, changes: dict[str, Any], factory: str) -> None:
    with pytest.raises(ConfigError, match=f"^{factory} raised ZeroDivisionError: on purpose .*in broken"):
        small_run(tmp_path, **changes)


def test_the_schedule_gets_the_optimizer_and_the_number_of_steps(tmp_path: Path) -> None:
    arguments: list[Any] = []

    def schedule(optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        arguments.extend([optimizer, total_steps])
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    run = small_run(tmp_path, schedule=schedule)
    assert arguments == [run.optimizer, run.total_steps]


def test_the_optimizer_does_not_get_frozen_parameters(tmp_path: Path) -> None:
    def frozen() -> nn.Module:
        model = net()
        model.get_submodule("0").requires_grad_(False)
        return model

    run = small_run(tmp_path, model=frozen)
    optimized = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in run.model.parameters() if p.requires_grad}
    assert len(optimized) == 4


def test_the_functions_that_a_handler_attaches_are_noted_by_its_name(tmp_path: Path) -> None:
    def act() -> None:
        return

    def first(trainer: Engine, run: Run) -> None:
        trainer.add_event_handler(Events.STARTED, act)

        @trainer.on(Events.COMPLETED)
        def at_end() -> None:
            return

    run = small_run(tmp_path, handlers=[first, lambda trainer, run: None])
    assert [name for name, _ in run.attached] == ["first", "first", "first", "<lambda>"]
    assert run.trainer.has_event_handler(act, Events.STARTED)


def test_a_handler_calls_the_trainer_as_it_calls_any_engine(tmp_path: Path) -> None:
    def act(engine: Engine, number: int) -> None:
        return

    def by_keyword(trainer: Engine, run: Run) -> None:
        trainer.add_event_handler(event_name=Events.STARTED, handler=act, number=3)

    ((_, handler), (name, attached)) = small_run(tmp_path, handlers=[by_keyword]).attached
    assert (handler, name) == (by_keyword, "by_keyword")
    assert (attached.func, attached.keywords) == (act, {"number": 3})


def test_best_uses_the_direction_of_the_metric(tmp_path: Path) -> None:
    metrics = {"error": MeanSquaredError}
    run = small_run(tmp_path, metrics=metrics, checkpoint={"monitor": "error"})
    assert run.best is not None
    assert (run.best.monitor, run.best.mode) == ("error", "min")
    assert small_run(tmp_path, metrics=metrics).best is None


def test_the_number_of_slots_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_slots is not resolved"):
        small_run(tmp_path, num_slots=None)


class Counting(nn.Linear):
    """A layer whose output depends on the number of its calls."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) / self.calls


def test_a_forward_that_depends_on_its_calls_is_refused_unless_nothing_is_promised(tmp_path: Path) -> None:
    changes = {"model": partial(Counting, 3, 1), "max_epochs": 1}
    with pytest.raises(ConfigError, match=r"it changes the attribute calls of Counting \(model\)"):
        trained(tmp_path / "refused", **changes)
    assert trained(tmp_path / "warned", **changes, deterministic=False)["step"] == 4
