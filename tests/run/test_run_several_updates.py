"""Several updates in a step: the bits of a loop by hand, each over its own parameters, or a refusal before a step."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import console, dies_after, points, small_config, trained
from torch import Tensor, nn

from disttrain import IndexShuffle, Update, seed_for
from disttrain.engine import Engine, Events
from disttrain.errors import ConfigError, NonFiniteError
from disttrain.evidence import params_sha256
from disttrain.run.several_updates import named
from disttrain.run.state import Run
from disttrain.seeding import manual_seed, seed_torch

STEPS, NUM_SAMPLES, STEPS_OF_AN_EPOCH = 6, 32, 4


def two() -> nn.Module:
    return nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2)), "b": nn.Linear(4, 1)})


def fits(model: nn.Module, batch: Any) -> tuple[Tensor, None, dict[str, Tensor]]:
    x, y = batch
    error = model["b"](model["a"](x).tanh()) - y  # type: ignore[index]
    return error.square().mean(), None, {"error": error.abs().mean()}


def is_small(model: nn.Module, batch: Any) -> tuple[Tensor, None]:
    """Go through both parts, with noise; train the first one."""
    x, _ = batch
    return model["b"](model["a"](x + torch.randn_like(x))).square().mean(), None  # type: ignore[index]


def of(part: str) -> Callable[[Any], Any]:
    return lambda model: model[part].parameters()


def adam(lr: float) -> Any:
    return partial(torch.optim.Adam, lr=lr)


B = Update("b", of("b"), fits, adam(0.1), grad_clip_norm=0.5)
A = Update("a", of("a"), is_small, adam(0.05), every=2)
FIELDS: dict[str, Any] = {
    "model": two,
    "loss": None,
    "optimizer": None,
    "valid_data": None,
    "max_epochs": None,
    "max_steps": STEPS,
    "updates": [B, A],
}


def small(folder: Path, **changes: Any) -> dict[str, Any]:
    return trained(folder, **(FIELDS | changes))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "small/metrics/train.jsonl").read_text().splitlines()]


def by_hand() -> tuple[str, list[dict[str, float]]]:
    """Train as the config says in a loop of torch alone, with one slot; return the weights' hash and the losses."""
    config = small_config(**FIELDS, num_slots=1)
    manual_seed(seed_for(config.seed, "init"))
    model = two()
    optimizers = {each.name: each.optimizer(list(each.parameters(model))) for each in (B, A)}
    data = points(NUM_SAMPLES)
    logged = []
    for step in range(STEPS):
        order = IndexShuffle(NUM_SAMPLES, seed_for(config.seed, "order", step // STEPS_OF_AN_EPOCH))
        start = step % STEPS_OF_AN_EPOCH * 8
        samples = [data[int(index)] for index in order[start : start + 8]]
        batch = [torch.stack(parts) for parts in zip(*samples, strict=True)]
        losses = {}
        for each in (B, A):
            if step % each.every:
                continue
            seed_torch(seed_for(seed_for(config.seed, "updates", *each.name.encode()), "step", step, 0))
            model.zero_grad()
            loss = each.forward(model, batch)[0]
            loss.backward()
            if each.grad_clip_norm is not None:
                nn.utils.clip_grad_norm_(each.parameters(model), each.grad_clip_norm)
            optimizers[each.name].step()
            losses[f"{each.name}/loss"] = float(loss)
        logged.append(losses)
    return params_sha256(model), logged


def test_the_bits_are_those_of_a_loop_by_hand(tmp_path: Path) -> None:
    expected, logged = by_hand()
    result = small(tmp_path, num_slots=1)
    assert [{key: line[key] for key in line if key.endswith("/loss")} for line in lines(tmp_path)] == logged
    assert result["params_sha256"] == expected
    for line, losses in zip(lines(tmp_path), logged, strict=True):
        assert line["loss"] == pytest.approx(sum(losses.values()))


def test_the_curves_hold_each_update_in_the_steps_in_which_it_is_due(tmp_path: Path) -> None:
    small(tmp_path)
    names = {"b/loss", "b/error", "b/grad_norm"}
    for line in lines(tmp_path):
        own = {name for name in line if "/" in name}
        assert own == (names | {"a/loss", "a/grad_norm"} if line["step"] % 2 else names)
        norms = [line[name] for name in own if name.endswith("/grad_norm")]
        assert line["grad_norm"] == pytest.approx(sum(norm**2 for norm in norms) ** 0.5)


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_that_died_goes_on_with_the_same_bits(tmp_path: Path, step: int) -> None:
    schedules = [
        B.model_copy(
            update={"schedule": lambda optimizer, n: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, n)}
        ),
        A.model_copy(update={"schedule": lambda optimizer, n: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}),
    ]
    changes: dict[str, Any] = {
        "updates": schedules,
        "ema": {"decay": 0.9},
        "checkpoint": {"every_steps": 1},
        "ledger": {"every_steps": 1},
    }
    whole = small(tmp_path / "whole", **changes)
    with pytest.raises(ValueError, match="on purpose"):
        small(tmp_path / "cut", **changes, handlers=[dies_after(step)])
    assert small(tmp_path / "cut", **changes)["params_sha256"] == whole["params_sha256"]
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    ledgers = [(tmp_path / name / "small/ledger.jsonl").read_text() for name in ("cut", "whole")]
    assert ledgers[0] == ledgers[1]
    assert "optimizer.b.b.weight.exp_avg" in ledgers[0]
    assert "optimizer.a.a.0.weight.exp_avg" in ledgers[0]


def test_each_update_sees_its_own_parameters_alone_and_handlers_see_all(tmp_path: Path) -> None:
    seen: dict[str, set[tuple[str, ...]]] = {"a": set(), "b": set(), "handlers": set()}

    def note(name: str, model: nn.Module) -> None:
        seen[name].add(tuple(each for each, parameter in model.named_parameters() if parameter.requires_grad))

    def watched(name: str, update: Update) -> Update:
        def forward(model: nn.Module, batch: Any) -> Any:
            note(name, model)
            return update.forward(model, batch)

        return update.model_copy(update={"forward": forward})

    def handler(trainer: Engine, run: Run) -> None:
        assert list(run.optimizers) == ["b", "a"]
        for event in (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED):
            trainer.add_event_handler(event, lambda: note("handlers", run.model))

    small(tmp_path, updates=[watched("b", B), watched("a", A)], handlers=[handler])
    everything = ("a.0.weight", "a.0.bias", "b.weight", "b.bias")
    assert seen == {"a": {everything[:2]}, "b": {everything[2:]}, "handlers": {everything}}


def test_a_frozen_parameter_stays_frozen_and_may_be_unfrozen_by_a_handler(tmp_path: Path) -> None:
    start = {name: tensor.clone() for name, tensor in two().state_dict().items()}
    weights: dict[int, dict[str, Tensor]] = {}

    def handler(trainer: Engine, run: Run) -> None:
        run.model["b"].weight.requires_grad_(False)  # type: ignore[index,union-attr]
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED(once=3),
            lambda: run.model["b"].weight.requires_grad_(True),  # type: ignore[index,union-attr]
        )

        @trainer.on(Events.ITERATION_COMPLETED)
        def keep() -> None:
            weights[trainer.state.iteration] = {n: t.clone() for n, t in run.model.state_dict().items()}

    small(tmp_path, handlers=[handler])
    assert start.keys() == weights[1].keys()
    assert torch.equal(weights[1]["b.weight"], weights[3]["b.weight"])
    assert not torch.equal(weights[1]["b.bias"], weights[2]["b.bias"])
    assert not torch.equal(weights[3]["b.weight"], weights[4]["b.weight"])


def test_the_forward_at_the_top_evaluates_and_may_be_monitored(tmp_path: Path) -> None:
    followed = {"monitor": "error", "mode": "min"}
    result = small(tmp_path, valid_data=partial(points, 12), forward=fits, checkpoint=followed)
    assert result["best"]["monitor"] == "error"
    plain = small(tmp_path / "plain")
    assert result["params_sha256"] == plain["params_sha256"]


def test_a_bad_gradient_of_one_update_leaves_that_one_out(tmp_path: Path) -> None:
    def bad(model: nn.Module, batch: Any) -> tuple[Tensor, None]:
        loss, _, _ = fits(model, batch)
        return loss * (float("nan") if torch.is_grad_enabled() else 1.0), None

    result = small(tmp_path, updates=[B, A.model_copy(update={"forward": bad})], on_nan="skip")
    assert result["skipped_steps"] == STEPS // 2
    assert [line.get("left_out", "").startswith("a: its gradient's norm is nan") for line in lines(tmp_path)] == [
        bool(step % 2) for step in range(1, STEPS + 1)
    ]
    with pytest.raises(NonFiniteError):
        small(tmp_path / "stop", updates=[B, A.model_copy(update={"forward": bad})])


def module_with_state() -> Any:
    class Forward(nn.Linear):
        def forward(self, model: Any, batch: Any) -> Any:  # type: ignore[override]
            return fits(model, batch)

    return Forward(2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([B], "expected every parameter with requires_grad in one of them, but model.a.0.weight, model.a.0.bias"),
        (
            [B, A.model_copy(update={"parameters": lambda model: model.parameters()})],
            "that no other update trains, but b",
        ),
        (
            [B, A.model_copy(update={"parameters": lambda model: []})],
            "updates.a.parameters: expected parameters of the model, got none",
        ),
        ([B, A.model_copy(update={"parameters": lambda model: 3})], "updates.a.parameters: expected parameters of the"),
        (
            [B, A.model_copy(update={"forward": module_with_state()})],
            "updates.a.forward: expected a function, or a Module",
        ),
        (
            [B, A.model_copy(update={"optimizer": lambda model: torch.optim.SGD(model.parameters())})],
            "updates.a.optimizer: expected the parameters of its update alone, got model.b.weight",
        ),
        (
            [B, A.model_copy(update={"optimizer": lambda parameters: torch.optim.SGD(list(parameters)[:1])})],
            "updates.a.optimizer: expected all parameters of its update in a group, got none of model.a.0.bias",
        ),
    ],
)
def test_what_an_update_cannot_train_is_refused_before_a_step(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small(tmp_path, updates=changes)
    assert message in str(caught.value)
    assert not (tmp_path / "small").exists()


def test_an_update_with_frozen_parameters_alone_is_refused_before_a_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^updates\.a\.parameters: expected a parameter with requires_grad"):
        small(tmp_path, model=half_frozen)
    assert not (tmp_path / "small").exists()


def test_groups_that_a_handler_adds_are_refused(tmp_path: Path) -> None:
    def handler(trainer: Engine, run: Run) -> None:
        extra = nn.Parameter(torch.zeros(1))
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED(once=2), lambda: run.optimizers["b"].add_param_group({"params": [extra]})
        )

    with pytest.raises(ConfigError, match=r"run\.optimizers: expected the groups with which the optimizers"):
        small(tmp_path, to=console(), handlers=[handler])


def detached(model: nn.Module, batch: Any) -> tuple[Tensor, None]:
    return is_small(model, batch)[0].detach(), None


def half_frozen() -> nn.Module:
    model = two()
    model["a"].requires_grad_(False)  # type: ignore[index]
    return model


def freezes_a(trainer: Engine, run: Run) -> None:
    run.model["a"].requires_grad_(False)  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"updates": [B, A.model_copy(update={"forward": detached})]},
            r"^updates\.a\.forward \(.*: expected a loss that",
        ),
        (
            {"updates": [B, A.model_copy(update={"forward": lambda model, batch: fits(model, batch)[0]})]},
            r"^updates\.a\.forward \(.*: expected \(loss, outputs\), got float32",
        ),
        ({"handlers": [freezes_a]}, r"^updates\.a: no parameter is left to train"),
    ],
)
def test_what_shows_in_a_step_names_the_update(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(tmp_path, **changes)


def test_an_error_about_a_field_of_the_config_does_not_name_an_update() -> None:
    with pytest.raises(ConfigError, match=r"^precision: expected"), named("a"):
        raise ConfigError("precision: expected another one")
