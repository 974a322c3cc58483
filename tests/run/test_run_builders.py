"""The model, the optimizer and the schedule of a run: what their factories may return."""

import copy
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import Ranks
from small_run import console, net, printed, small_config, small_run, trained
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from disttrain import parameter_groups
from disttrain.backend import Backend
from disttrain.engine import Engine, Events
from disttrain.errors import ConfigError
from disttrain.handlers.checkpoint import Checkpoint
from disttrain.handlers.preemption import Preemption
from disttrain.precision import FP32
from disttrain.run.builders import build_model
from disttrain.run.directory import RunDirectory
from disttrain.run.freezing import names_by_group
from disttrain.run.state import Run
from disttrain.run.train import train


class SteppedByEpoch:
    def step(self, epoch: int) -> None: ...


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": torch.optim.LBFGS}, "optimizer: LBFGS.step needs closure"),
        ({"optimizer": lambda parameters: [torch.optim.SGD(parameters)]}, "got a list; return one optimizer over all"),
        (
            {"schedule": lambda optimizer, n: ReduceLROnPlateau(optimizer), "valid_data": None},
            "ReduceLROnPlateau.step needs metrics: a run gives it the monitored value after each evaluation, but there",
        ),
        ({"schedule": lambda optimizer, n: SteppedByEpoch()}, "SteppedByEpoch.step needs epoch"),
        ({"schedule": lambda optimizer, n: 0.1}, "expected a function that returns a schedule with step(), got 0.1"),
    ],
)
def test_an_optimizer_or_a_schedule_that_cannot_step_is_refused_before_the_first_step(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        small_run(tmp_path, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize("make", [lambda layer: layer, lambda layer: torch.nn.Sequential(torch.nn.Flatten(), layer)])
def test_a_model_of_torchscript_is_refused_with_fsdp_alone(tmp_path: Path, make: Any) -> None:
    changes = {"model": lambda: make(torch.jit.script(torch.nn.Linear(3, 1))), "optimizer": no_closure}
    assert small_run(tmp_path, **changes).optimizer is not None
    with pytest.raises(ConfigError, match=r"(the model|1) is compiled by torch.jit, which takes no hooks"):
        small_run(tmp_path, **changes, strategy="fsdp")


def test_recomputation_is_refused_on_xla_devices(tmp_path: Path) -> None:
    backend: Any = SimpleNamespace(device=torch.device("xla"), move=lambda model: model)
    with pytest.raises(ConfigError, match="activation_checkpointing has not been built for XLA devices; leave it out"):
        build_model(small_config(activation_checkpointing="Linear"), backend)


def no_closure(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1)


SCHEDULES: list[Any] = [
    lambda optimizer, n: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n),
    lambda optimizer, n: ReduceLROnPlateau(optimizer),
    lambda optimizer, n: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=n),
    lambda optimizer, n: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    lambda optimizer, n: torch.optim.lr_scheduler.SequentialLR(
        optimizer, [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.StepLR(optimizer, 2)], [4]
    ),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torchs_schedules_are_accepted(tmp_path: Path, schedule: Any) -> None:
    assert small_run(tmp_path, optimizer=no_closure, schedule=schedule).schedule is not None


def test_threads_that_a_factory_sets_for_its_machine_do_not_count(tmp_path: Path) -> None:
    def greedy() -> nn.Module:
        torch.set_num_threads(before + 2)
        return net()

    before = torch.get_num_threads()
    try:
        small_run(tmp_path, model=greedy, cpu_threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Centre(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(1, 1))

    def forward(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (y_pred - y + self.centre).square().mean()


def of_model(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, weight_decay=0.3), lr=lr)


def of_both(model: nn.Module, loss: nn.Module, params: Any) -> torch.optim.Optimizer:
    assert [id(each) for each in params] == [id(each) for part in (model, loss) for each in part.parameters()]
    return torch.optim.AdamW([*parameter_groups(model, weight_decay=0.3), {"params": loss.parameters(), "lr": 0.01}])


def of_frozen(model: Any, lr: float = 0.05) -> torch.optim.Optimizer:
    model[0].requires_grad_(False)
    return of_model(model, lr)


def of_a_part(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model[2].parameters(), lr=0.1)


def keeps_the_rest(trainer: Engine, run: Run) -> None:
    run.keep("rest", torch.optim.SGD([*run.model[0].parameters(), *run.model[1].parameters()], lr=0.1))  # type: ignore[index]


class Masters(FP32):
    """Steps copies of its own."""

    name = "masters"

    def __init__(self, device: torch.device) -> None:
        pass

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        for group in optimizer.param_groups:
            group["params"] = [nn.Parameter(each.detach().clone()) for each in group["params"]]
        return model, optimizer


def exchanges(model: nn.Module) -> torch.optim.Optimizer:
    model.more = nn.Parameter(torch.ones(2))
    return of_model(model)


def twice(model: Any) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns, and steps it twice
        return torch.optim.SGD([model[0].weight, *model.parameters()], lr=0.1)


def in_two_groups(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": model.parameters()}, {"params": model[0].weight}], lr=0.1)


def test_a_factory_that_asks_for_parts_gets_those_of_the_run(tmp_path: Path) -> None:
    run = small_run(tmp_path, optimizer=of_both, loss=Centre())
    decayed, others, of_loss = run.optimizer.param_groups
    assert names_by_group(run.optimizer, dict(run.step_function.named_parameters())) == [
        ["model.0.weight", "model.2.weight"],
        ["model.0.bias", "model.1.weight", "model.1.bias", "model.2.bias"],
        ["loss.centre"],
    ]
    assert [group["weight_decay"] for group in (decayed, others, of_loss)] == [0.3, 0.0, 0.01]
    assert of_loss["params"][0] is run.step_function.loss.centre  # type: ignore[union-attr]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_groups_of_a_run_train_as_in_a_plain_loop(tmp_path: Path, strategy: Any) -> None:
    batches: list[Any] = []

    def collects(trainer: Engine, run: Run) -> None:
        trainer.add_event_handler(Events.ITERATION_STARTED, lambda: batches.append(trainer.state.batch))
        begun.append(copy.deepcopy(run.model.state_dict()))

    begun: list[Any] = []
    changes = {"model": plain_net, "optimizer": of_model, "handlers": [collects], "strategy": strategy}
    trained(tmp_path, **changes)
    model = plain_net()
    model.load_state_dict(begun[0])
    decayed, others = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}])
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    for first, second in batches:  # two slots: their gradients are added, and halved
        optimizer.zero_grad()
        for x, y in (first, second):
            nn.functional.mse_loss(model(x), y).backward()
        for parameter in model.parameters():
            parameter.grad.div_(2)  # type: ignore[union-attr]
        optimizer.step()
    holder = plain_net()
    Checkpoint.load_objects({"model": holder}, tmp_path / "small" / "checkpoints")
    assert len(batches) == 8
    assert all(torch.equal(*pair) for pair in zip(holder.parameters(), model.parameters(), strict=True))


def plain_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": of_model, "loss": Centre()}, "in a group, but loss.centre would get a gradient, count in its"),
        ({"optimizer": of_a_part}, "in a group, but model.0.weight, model.0.bias, model.1.weight and 1 more would"),
        (
            {"optimizer": of_a_part, "precision": Masters},
            "in a group, but model.0.weight, model.0.bias, model.1.weight",
        ),
        ({"optimizer": exchanges}, "leaves the model's parameters where they are, but it has added, removed or"),
        ({"optimizer": twice}, "SGD has the parameter model.0.weight twice, so it would be stepped twice"),
        (
            {"optimizer": in_two_groups},
            "optimizer raised ValueError: some parameters appear in more than one parameter",
        ),
        (
            {"optimizer": lambda model: torch.optim.SGD(model)},
            "optimizer raised TypeError: optimizer can only optimize",
        ),
    ],
)
def test_groups_that_would_train_something_wrong_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str, strategy: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        small_run(tmp_path, **changes, strategy=strategy)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_factory_may_freeze_and_a_handler_may_step_the_rest(tmp_path: Path) -> None:
    run = small_run(tmp_path, optimizer=of_frozen)
    assert [name for name, each in run.model.named_parameters() if not each.requires_grad] == ["0.weight", "0.bias"]
    assert small_run(tmp_path, optimizer=of_model, precision=Masters).precision.name == "masters"
    run = small_run(tmp_path, optimizer=of_a_part, handlers=[keeps_the_rest])
    assert list(run.kept) == ["rest"]


def test_a_run_says_which_parameters_a_factory_of_parameters_leaves_out(tmp_path: Path) -> None:
    to = console()
    part = partial(torch.optim.SGD, lr=0.1)
    trained(tmp_path, to, optimizer=lambda parameters: part(parameters[:5]), max_epochs=None, max_steps=1)
    assert "WARNING: the optimizer leaves out model.2.bias, which get a gradient that counts in its norm" in printed(to)


def live(backend: Backend, folder: Path, strategy: str, max_steps: int) -> dict[str, Any]:
    config = small_config(
        optimizer=partial(of_both_frozen, lr=0.05),
        loss=Centre(),
        strategy=strategy,
        num_slots=4,
        max_epochs=None,
        max_steps=max_steps,
        handlers=[thaws],
        grad_clip_norm=0.5,
    )
    with Preemption() as preemption:
        return train(config, backend, RunDirectory(folder / "small"), console(), preemption)


def of_both_frozen(model: Any, loss: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Freeze the first layer, and give it a group of its own, with a lower rate."""
    model[0].requires_grad_(False)
    groups = [group for part in (model[0], model[1:], loss) for group in parameter_groups(part, weight_decay=0.3)]
    frozen = parameter_groups(model[0], weight_decay=0.1, frozen=True)
    return torch.optim.AdamW([*groups, *({**group, "lr": lr / 10} for group in frozen)], lr=lr)


def thaws(trainer: Engine, run: Run) -> None:
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: run.model[0].requires_grad_(True))  # type: ignore[index]


@pytest.mark.parametrize("first", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_stopped_and_resumed_on_other_ranks_and_strategies_the_groups_are_the_same(
    ranks: Ranks, tmp_path: Path, first: str
) -> None:
    (whole,) = ranks(1, live, tmp_path / "whole", "ddp", 7)
    ranks(3, live, tmp_path, first, 5)  # of epochs of four steps; the first layer trains from the fourth step on
    for result in ranks(2, live, tmp_path, "fsdp" if first == "ddp" else "ddp", 7):
        assert (result["params_sha256"], result["step"]) == (whole["params_sha256"], 7)
