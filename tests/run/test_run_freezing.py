"""Parameters that handlers freeze, unfreeze and give to the optimizer under way: a resumed run trains the same ones."""

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
from disttrain.checkpoint import load
from disttrain.engine import Engine, Events
from disttrain.errors import CheckpointError, ConfigError
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.freezing import FLAGS, GROUPS, names_by_group
from disttrain.run.resume import restore
from disttrain.run.state import Run
from disttrain.run.train import train

NUM_STEPS = 12  # three epochs of four steps


def blocks(*frozen: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    for index in frozen:
        model[index].requires_grad_(False)
    return model


def freezes_later(trainer: Engine, run: Run) -> None:
    """Freeze the first block from the second epoch on."""
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: run.model[0].requires_grad_(False))


def adds_later(trainer: Engine, run: Run) -> None:
    """Unfreeze the first block inside an epoch, and a third one from the next epoch on, each with a group of its own.

    EPOCH_STARTED fires again when a run resumes inside the epoch.
    """

    def unfreeze(index: int, rate: float) -> None:
        run.model[index].requires_grad_(True)
        run.optimizer.add_param_group({"params": run.model[index].parameters(), "lr": rate})

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), unfreeze, 0, 0.03)
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), unfreeze, 2, 0.02)


def freezes_and_unfreezes(trainer: Engine, run: Run) -> None:
    """Freeze at the start, unfreeze in the first epoch, freeze again in the second, unfreeze in its middle."""
    trainer.add_event_handler(Events.STARTED, lambda: run.model[2].requires_grad_(False))
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda: run.model[2].requires_grad_(True))
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: run.model[2].requires_grad_(False))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), lambda: run.model[2].requires_grad_(True))
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda: run.model[0].requires_grad_(False))


def moves_between_groups(trainer: Engine, run: Run) -> None:
    """Take the first block out of the group that the config makes, and give it one of its own."""

    def move() -> None:
        [group] = run.optimizer.param_groups
        mine = list(run.model[0].parameters())
        group["params"] = [each for each in group["params"] if not any(each is other for other in mine)]
        run.optimizer.add_param_group({"params": mine, "lr": 0.001, "weight_decay": 0.3})

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), move)


PROGRAMS: dict[str, tuple[Callable[[Engine, Run], None], tuple[int, ...]]] = {
    each.__name__: (each, frozen)
    for each, frozen in [
        (freezes_later, ()),
        (adds_later, (0, 2)),
        (freezes_and_unfreezes, ()),
        (moves_between_groups, ()),
    ]
}


def changes_of(program: str, num_slots: int = 6) -> dict[str, Any]:
    handler, frozen = PROGRAMS[program]
    return {
        "model": partial(blocks, *frozen),
        "train_data": partial(points, 48),
        "valid_data": None,
        "optimizer": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        "global_batch_size": 12,
        "num_slots": num_slots,
        "max_epochs": None,
        "max_steps": NUM_STEPS,
        "handlers": [handler],
        "grad_clip_norm": 1.0,
        "ledger": {"every_steps": 1},
        "checkpoint": {"every_steps": 2, "asynchronous": False},
    }


def dies(step: int, trainer: Engine, run: Run) -> None:
    def die() -> None:
        raise InterruptedError(f"dies in step {step}")

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=step), die)


def slower(optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.StepLR:
    return torch.optim.lr_scheduler.StepLR(optimizer, total_steps // 4, gamma=0.5)


def live(backend: Backend, folder: Path, program: str, num_slots: int, dies_in: int | None, strategy: str) -> str:
    """Train on the ranks of the pool, up to an exception in step `dies_in`; return what was printed."""
    changes = changes_of(program, num_slots)
    if dies_in is not None:
        changes["handlers"].append(partial(dies, dies_in))
    name, _, gather = strategy.partition("-")
    config = small_config(**changes, schedule=slower, strategy=name, fsdp_gather=gather or "step")
    to = console()
    with Preemption() as preemption:
        train(config, backend, RunDirectory(folder / "small"), to, preemption)
    return printed(to)


def ledger(folder: Path) -> str:
    return (folder / "small" / "ledger.jsonl").read_text()


@pytest.mark.parametrize("program", PROGRAMS)
def test_stopped_again_and_again_a_run_has_the_bits_of_the_whole(tmp_path: Path, program: str) -> None:
    changes = changes_of(program)
    whole = trained(tmp_path / "whole", **changes)
    for step in (3, 5, 6, 8, NUM_STEPS):  # inside an epoch, after a change, at an epoch's end
        parts = trained(tmp_path / "parts", **(changes | {"max_steps": step, "handlers": [PROGRAMS[program][0]]}))
    assert parts["params_sha256"] == whole["params_sha256"]
    assert ledger(tmp_path / "parts") == ledger(tmp_path / "whole")


@pytest.mark.parametrize(
    ("program", "num_slots", "strategies"),
    [
        ("freezes_later", 6, ("ddp", "fsdp")),
        ("adds_later", 6, ("fsdp", "fsdp")),
        pytest.param("adds_later", 6, ("ddp", "ddp"), marks=pytest.mark.slow),
        ("freezes_and_unfreezes", 3, ("fsdp-module", "ddp")),
        pytest.param("moves_between_groups", 6, ("ddp", "fsdp"), marks=pytest.mark.slow),
    ],
)
def test_killed_on_three_ranks_and_resumed_on_two(
    tmp_path: Path, ranks: Ranks, program: str, num_slots: int, strategies: tuple[str, str]
) -> None:
    trained(tmp_path / "whole", **changes_of(program, num_slots), schedule=slower)
    first, second = strategies
    with pytest.raises(RankFailure, match="dies in step 8"):
        ranks(3, live, tmp_path, program, num_slots, 8, first, timeout_s=120)
    output = ranks(2, live, tmp_path, program, num_slots, None, second, timeout_s=120)[0]
    assert "resuming from step 6 (epoch 2)" in output
    assert ledger(tmp_path) == ledger(tmp_path / "whole")


def test_a_checkpoint_names_what_has_changed_since_the_start(tmp_path: Path) -> None:
    run = small_run(tmp_path, **changes_of("adds_later"))
    names = [f"model.{index}.{kind}" for index in (0, 2, 4) for kind in ("weight", "bias")]
    assert run.freezing.position() == {FLAGS: {}}
    assert run.freezing.tensors() == {}
    run.model[0].requires_grad_(True)
    run.optimizer.add_param_group({"params": run.model[0].weight, "lr": 0.5})
    assert run.position()[FLAGS] == {names[0]: True, names[1]: True}
    assert run.position()[GROUPS] == [names[4:], names[:1]]
    hashed = {name: tensor.item() for name, tensor in run.freezing.tensors().items()}
    flags = {"optimizer.0.weight.requires_grad": True, "optimizer.0.bias.requires_grad": True}
    groups = {"optimizer.4.weight.group": 0, "optimizer.4.bias.group": 0, "optimizer.0.weight.group": 1}
    assert hashed == flags | groups
    assert hashed.keys() <= run.state_tensors().keys()


def test_what_a_handler_does_when_it_is_called_is_the_start(tmp_path: Path) -> None:
    def at_once(trainer: Engine, run: Run) -> None:
        run.model[0].requires_grad_(True)
        run.optimizer.add_param_group({"params": run.model[0].parameters()})

    run = small_run(tmp_path, model=partial(blocks, 0), handlers=[at_once])
    assert run.freezing.position() == {FLAGS: {}}


def test_a_position_takes_the_place_of_another(tmp_path: Path) -> None:
    """A newer checkpoint may turn out to be damaged after its position was loaded."""
    whole = changes_of("adds_later")
    trained(tmp_path, **whole)
    newest = tmp_path / "small" / "checkpoints" / f"step-{NUM_STEPS:08}"
    position = load(newest).manifest.position
    run = small_run(tmp_path / "other", **whole)
    before = names_by_group(run.optimizer, dict(run.step_function.named_parameters()))
    run.freezing.load(position)
    assert len(run.optimizer.param_groups) == 3
    assert {key: position[key] for key in (FLAGS, GROUPS)} == run.freezing.position()
    run.freezing.load({})
    assert names_by_group(run.optimizer, dict(run.step_function.named_parameters())) == before
    assert run.freezing.position() == {FLAGS: {}}


def test_a_model_without_a_named_parameter_is_refused(tmp_path: Path) -> None:
    run = small_run(tmp_path, **changes_of("freezes_later"))
    with pytest.raises(ConfigError, match=r"the model has no model\.6\.bias: expected the model with which the run"):
        run.freezing.load({FLAGS: {"model.0.bias": False, "model.6.bias": False}})
    with pytest.raises(ConfigError, match=r"the model has no model\.9\.weight"):
        run.freezing.load({GROUPS: [["model.0.bias"], ["model.9.weight"]]})
    assert run.freezing.position() == {FLAGS: {}}


def test_events_that_fire_again_change_nothing_and_a_warning_says_so(tmp_path: Path) -> None:
    changes = changes_of("freezes_and_unfreezes")
    trained(tmp_path, **(changes | {"max_steps": 7}))
    to = console()
    trained(tmp_path, to, **changes)
    assert "which fire again when a run resumes, changed requires_grad of model.2.weight, model.2.bias" in printed(to)


def test_an_older_checkpoint_does_not_undo_what_handlers_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def freezes(trainer: Engine, run: Run) -> None:
        trainer.add_event_handler(Events.STARTED, lambda: run.model[0].requires_grad_(False))

    changes = changes_of("freezes_later") | {"handlers": [freezes]}
    whole = trained(tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        patch.setattr("disttrain.run.freezing.Freezing.position", lambda self: {FLAGS: {}})
        position = Run.position
        patch.setattr(Run, "position", lambda self: {k: v for k, v in position(self).items() if k != FLAGS})
        patch.setattr("disttrain.run.freezing.Freezing.tensors", lambda self: {})
        trained(tmp_path / "parts", **(changes | {"max_steps": 6}))
    assert trained(tmp_path / "parts", **changes)["params_sha256"] == whole["params_sha256"]


def unfreezes_alone(trainer: Engine, run: Run) -> None:
    trainer.add_event_handler(Events.ITERATION_STARTED(once=2), lambda: run.model[0].requires_grad_(True))


def live_unfreezing(backend: Backend, folder: Path) -> None:
    changes = changes_of("adds_later") | {"handlers": [unfreezes_alone], "strategy": "fsdp"}
    with Preemption() as preemption:
        train(small_config(**changes), backend, RunDirectory(folder / "small"), console(), preemption)


LOST = (
    r"expected every parameter with requires_grad in a group of the optimizer, but model\.0\.weight, model\.0\.bias "
    r"would get a gradient and never be trained; .* run\.optimizer\.add_param_group"
)


def test_a_parameter_that_no_optimizer_has_is_refused(tmp_path: Path, ranks: Ranks) -> None:
    with pytest.raises(ConfigError, match=LOST):
        trained(tmp_path, **(changes_of("adds_later") | {"handlers": [unfreezes_alone]}))
    outcomes = ranks.outcomes(2, live_unfreezing, tmp_path / "ranks")
    assert [type(getattr(each, "error", None)) for each in outcomes] == [ConfigError, ConfigError]
    assert len({str(getattr(each, "error", None)) for each in outcomes}) == 1


def test_an_optimizer_over_a_part_of_the_parameters_is_the_configs_choice(tmp_path: Path) -> None:
    optimizer = {"optimizer": lambda given: torch.optim.SGD(given[:-1], lr=0.1), "max_steps": 3}
    assert trained(tmp_path, **(changes_of("freezes_later") | optimizer))["step"] == 3


def test_a_parameter_of_a_kept_optimizer_is_trained_by_that(tmp_path: Path) -> None:
    def second(trainer: Engine, run: Run) -> None:
        optimizer = run.keep("second", torch.optim.SGD(run.model[4].parameters(), lr=0.1))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: optimizer.step())

    first = {"optimizer": lambda given: torch.optim.SGD(given[:-2], lr=0.1), "handlers": [second], "max_steps": 2}
    assert trained(tmp_path, **(changes_of("freezes_later") | first))["step"] == 2


def test_a_group_with_a_parameter_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    def adds_a_stranger(trainer: Engine, run: Run) -> None:
        group = {"params": nn.Parameter(torch.ones(5))}
        trainer.add_event_handler(Events.ITERATION_STARTED(once=2), run.optimizer.add_param_group, group)

    with pytest.raises(ConfigError, match=r"AdamW has a parameter of shape \[5\] that belongs neither to the model"):
        trained(tmp_path, **(changes_of("freezes_later") | {"handlers": [adds_a_stranger]}))


class Unfreezing:
    """A kept object whose load_state_dict has another idea of what is frozen than the checkpoint."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.requires_grad_(True)


def test_flags_that_are_not_as_they_were_saved_stop_the_run(tmp_path: Path) -> None:
    def keeping(trainer: Engine, run: Run) -> None:
        run.keep("unfreezing", Unfreezing(run.model))
        freezes_later(trainer, run)

    changes = changes_of("freezes_later") | {"handlers": [keeping]}
    trained(tmp_path, **(changes | {"max_steps": 6}))
    with pytest.raises(CheckpointError, match=r"position\.requires_grad\.model\.0\.weight was not restored as it was"):
        restore(small_run(tmp_path, **changes), console())
