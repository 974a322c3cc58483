"""The moving average of the weights: the values of a plain loop, what is evaluated, kills, ranks and strategies."""

import json
import math
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from ranks import Ranks
from small_run import console, dies_after, net, points, small_config, small_run, trained
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from disttrain.backend import Backend
from disttrain.checkpoint import export
from disttrain.engine import Engine, Events
from disttrain.errors import CheckpointError, ConfigError
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.ema import Ema, build_ema
from disttrain.run.state import Run
from disttrain.run.train import train

DECAY = 0.75
OFTEN: dict[str, Any] = {"log": {"every_steps": 1}, "ledger": {"every_steps": 1}, "checkpoint": {"every_steps": 2}}


class Recorder:
    """A handler that notes the weights before the first step and after each one, and the shadows at the end."""

    __name__ = "recorder"

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.shadows: dict[str, Tensor] = {}

    def __call__(self, trainer: Engine, run: Run) -> None:
        def note() -> None:
            self.weights.append({name: each.detach().clone() for name, each in run.step_function.named_parameters()})

        def note_shadows() -> None:
            assert run.ema is not None
            self.shadows = {name: shadow.clone() for name, shadow in run.ema.shadows.items()}

        trainer.add_event_handler(Events.STARTED, note)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
        trainer.add_event_handler(Events.COMPLETED, note_shadows)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def plain_average(weights: list[dict[str, Tensor]], decay: float = DECAY) -> dict[str, Tensor]:
    """Return the average of a loop that calls torch's own function after each of these steps."""
    average, fold = {name: each.clone() for name, each in weights[0].items()}, get_ema_multi_avg_fn(decay)
    for after_step in weights[1:]:
        fold(list(average.values()), [after_step[name] for name in average], 0)
    return average


def test_the_average_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    recorder = Recorder()
    trained(tmp_path, handlers=[recorder], ema={"decay": DECAY})
    assert len(recorder.weights) == 9
    assert same(recorder.shadows, plain_average(recorder.weights))
    exact = recorder.weights[0]["model.0.weight"].double()
    for weights in recorder.weights[1:]:
        exact = DECAY * exact + (1 - DECAY) * weights["model.0.weight"].double()
    torch.testing.assert_close(recorder.shadows["model.0.weight"].double(), exact, rtol=1e-5, atol=1e-6)


class WithNan(torch.utils.data.Dataset[Any]):
    """The usual points; those of one step of the first epoch, and of some of the second, have a nan."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        x, y = points(32)[index]
        return (x * math.nan if index == 3 else x), y


def plain_net() -> nn.Module:
    return nn.Linear(3, 1)


@pytest.mark.parametrize("on_nan", ["skip", pytest.param("rollback", marks=pytest.mark.slow)])
def test_every_so_many_steps_of_the_optimizer_and_those_left_out_do_not_count(tmp_path: Path, on_nan: Any) -> None:
    recorder = Recorder()
    fields: dict[str, Any] = {**OFTEN, "model": plain_net, "train_data": WithNan, "on_nan": on_nan}
    result = trained(tmp_path, handlers=[recorder], ema={"decay": DECAY, "every_steps": 2}, **fields)
    assert result["skipped_steps"] == 2
    lines = [json.loads(line) for line in (tmp_path / "small" / "metrics" / "train.jsonl").read_text().splitlines()]
    counted = [line["step"] for line in lines if "left_out" not in line]
    assert len(counted) == 6
    if on_nan == "skip":  # with "rollback" the recorder saw several attempts
        assert same(recorder.shadows, plain_average([recorder.weights[step] for step in [0, *counted[1::2]]]))
    again = Recorder()
    dies = dies_after(5)
    with pytest.raises(ValueError, match="on purpose"):
        trained(tmp_path / "cut", handlers=[dies], ema={"decay": DECAY, "every_steps": 2}, **fields)
    trained(tmp_path / "cut", handlers=[again], ema={"decay": DECAY, "every_steps": 2}, **fields)
    assert same(again.shadows, recorder.shadows)


def valid_loss(weights: dict[str, Tensor], buffers: dict[str, Tensor]) -> float:
    """Return the validation loss of these weights, by a few lines of torch."""
    model = net().eval()
    model.load_state_dict({name.removeprefix("model."): each for name, each in weights.items()} | buffers)
    x, y = points(12).tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        return nn.functional.mse_loss(model(x), y).item()


@pytest.mark.parametrize("evaluate", [True, False])
def test_the_average_is_evaluated_on_wish_and_exported_with_the_buffers_of_the_model(
    tmp_path: Path, evaluate: bool
) -> None:
    recorder = Recorder()
    plain = trained(tmp_path / "plain")
    result = trained(tmp_path, handlers=[recorder], ema={"decay": DECAY, "evaluate": evaluate})
    assert result["params_sha256"] == plain["params_sha256"]  # the average changes no bit of what is trained
    checkpoint = tmp_path / "small" / "checkpoints" / "step-00000008"
    files = {name: tmp_path / f"{name}.safetensors" for name in ("evaluated", "trained", "ema")}
    done = {name: export(checkpoint, file, name) for name, file in files.items()}  # type: ignore[arg-type]
    assert {name: each.average for name, each in done.items()} == {"evaluated": evaluate, "trained": False, "ema": True}
    loaded = {name: safetensors.torch.load_file(file) for name, file in files.items()}
    assert same(loaded["evaluated"], loaded["ema" if evaluate else "trained"])
    average, last = plain_average(recorder.weights), recorder.weights[-1]
    buffers = {name: each for name, each in loaded["trained"].items() if f"model.{name}" not in last}
    assert same(loaded["ema"], {name.removeprefix("model."): each for name, each in average.items()} | buffers)
    assert same(loaded["trained"], {name.removeprefix("model."): each for name, each in last.items()} | buffers)
    expected = valid_loss(average if evaluate else last, buffers)
    assert result["metrics"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_run_without_an_average_has_none_to_export(tmp_path: Path) -> None:
    trained(tmp_path, max_epochs=1)
    with pytest.raises(CheckpointError, match=r"holds no average of the weights: its run has no ema\.decay"):
        export(tmp_path / "small" / "checkpoints" / "step-00000004", tmp_path / "m", "ema")


def thaw_and_freeze(trainer: Engine, run: Run) -> None:
    run.model[0].requires_grad_(False)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda: run.model[0].requires_grad_(True))
    trainer.add_event_handler(Events.ITERATION_STARTED(once=6), lambda: run.model[2].requires_grad_(False))


def test_parameters_that_are_frozen_and_thawed_on_the_way_are_averaged_as_if_all_had_been(tmp_path: Path) -> None:
    recorder, resumed = Recorder(), Recorder()
    trained(tmp_path, handlers=[thaw_and_freeze, recorder], ema={"decay": DECAY}, **OFTEN)
    assert same(recorder.shadows, plain_average(recorder.weights))
    assert torch.equal(recorder.weights[2]["model.0.weight"], recorder.weights[0]["model.0.weight"])
    assert torch.equal(recorder.weights[5]["model.2.weight"], recorder.weights[8]["model.2.weight"])
    cut = tmp_path / "cut"
    for step in (3, 5, 7):
        with pytest.raises(ValueError, match="on purpose"):
            trained(cut, handlers=[thaw_and_freeze, dies_after(step)], ema={"decay": DECAY}, **OFTEN)
    trained(cut, handlers=[thaw_and_freeze, resumed], ema={"decay": DECAY}, **OFTEN)
    assert same(resumed.shadows, recorder.shadows)
    assert ledger(cut / "small") == ledger(tmp_path / "small")


def test_a_frozen_model_has_no_shadow_of_it(tmp_path: Path) -> None:
    def backbone() -> nn.Module:
        model = net()
        model[0].requires_grad_(False)
        return model

    recorder = Recorder()
    trained(tmp_path, model=backbone, handlers=[recorder], ema={"decay": DECAY})
    assert sorted(recorder.shadows) == ["model.1.bias", "model.1.weight", "model.2.bias", "model.2.weight"]


def ledger(folder: Path) -> list[str]:
    return (folder / "ledger.jsonl").read_text().splitlines()


class Scaled(nn.Module):
    """A loss with a parameter of its own, of the shape of one of the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, y_pred: Tensor, y: Tensor) -> Tensor:
        return (y_pred - y).square().mean() * self.weight.mean() - self.weight.mean().log()


def live(backend: Backend, folder: str, strategy: Any, ends_at: int | None) -> str:
    """Train on one rank, to an exception at a step or to the end."""
    config = small_config(
        **OFTEN | {"validate": {"every_steps": 3}},
        loss=Scaled(),
        num_slots=4,
        strategy=strategy,
        ema={"decay": DECAY, "every_steps": 2},
        handlers=[] if ends_at is None else [dies_after(ends_at)],
    )
    try:
        with Preemption(backend, starting=True) as preemption:
            train(config, backend, RunDirectory(Path(folder) / "small"), console(), preemption)
    except ValueError as error:
        return str(error)
    return "completed"


@pytest.mark.parametrize(
    "lives",
    [[(3, "fsdp", 5), (2, "ddp", None)], [(2, "ddp", 3), (3, "fsdp", None)]],
    ids=["sharded, then whole", "whole, then sharded"],
)
def test_killed_and_resumed_on_other_ranks_under_the_other_strategy(
    ranks: Ranks, tmp_path: Path, lives: list[tuple[int, str, int | None]]
) -> None:
    assert ranks(1, live, str(tmp_path / "whole"), "ddp", None) == ["completed"]
    for world_size, strategy, ends_at in lives:
        outcome = "completed" if ends_at is None else "on purpose"
        assert ranks(world_size, live, str(tmp_path / "cut"), strategy, ends_at) == [outcome] * world_size
    whole, cut = (ledger(tmp_path / name / "small") for name in ("whole", "cut"))
    assert '"kept.ema.loss.weight"' in whole[-1]
    assert '"kept.ema.model.0.weight"' in whole[-1]
    assert cut == whole
    results = [json.loads((tmp_path / name / "small" / "result.json").read_text()) for name in ("whole", "cut")]
    assert results[0]["metrics"] == results[1]["metrics"]


def test_an_average_cannot_begin_under_way(tmp_path: Path) -> None:
    trained(tmp_path, max_epochs=1)
    with pytest.raises(ConfigError, match=r"ema.decay=None in the checkpoint, 0.5 here"):
        trained(tmp_path, ema={"decay": 0.5})


def test_an_optimizer_that_averages_by_itself_is_refused(tmp_path: Path) -> None:
    matrix = Path(__file__).parent.parent / "integration" / "matrix" / "schedule_free.py"
    schedule_free = partial(runpy.run_path(str(matrix))["ScheduleFreeSGD"], lr=0.1)
    with pytest.raises(ConfigError, match=r"^ema.decay: expected None with ScheduleFreeSGD"):
        small_run(tmp_path, optimizer=schedule_free, ema={"decay": 0.5})


class OnXla:
    device = torch.device("xla")


def test_xla_devices_are_refused() -> None:
    model, config = nn.Linear(1, 1), small_config(ema={"decay": 0.5})
    sgd = torch.optim.SGD(model.parameters())
    with pytest.raises(ConfigError, match=r"^ema.decay: expected None on XLA devices"):
        build_ema(config, model, sgd, Stepping(), OnXla())  # type: ignore[arg-type]


class Stepping:
    """A double of a run's updates, whose optimizer has stepped."""

    stepped, num_skipped = True, 0
    before_update: list[Any] = []


def test_weights_of_16_bits_have_an_average_that_small_steps_move() -> None:
    model = nn.Linear(2, 2).bfloat16()
    ema = Ema(model, Stepping(), decay=0.999, every_steps=1)  # type: ignore[arg-type]
    nn.init.ones_(model.weight)
    ema.begin()
    nn.init.constant_(model.weight, 1.0625)
    engine = Engine(lambda engine, batch: None)
    for _ in range(10):
        ema.update(engine)
    assert ema.shadows["weight"].dtype == torch.float32
    expected = 1.0625 - 0.0625 * 0.999**10
    assert torch.allclose(ema.shadows["weight"], torch.full((2, 2), expected), rtol=1e-6)
    with ema.applied():
        assert torch.equal(model.weight, torch.full((2, 2), expected).bfloat16())
    assert torch.equal(model.weight, torch.full((2, 2), 1.0625).bfloat16())


def test_weights_come_back_if_an_evaluation_fails() -> None:
    model = nn.Linear(2, 2)
    ema = Ema(model, Stepping(), decay=0.5, every_steps=1)  # type: ignore[arg-type]
    ema.begin()
    nn.init.ones_(model.weight)
    with pytest.raises(ValueError, match="on purpose"), ema.applied():
        assert not torch.equal(model.weight, torch.ones(2, 2))
        raise ValueError("on purpose")
    assert torch.equal(model.weight, torch.ones(2, 2))


def test_tied_weights_have_one_shadow_with_both_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    ema = Ema(model, Stepping(), decay=0.5, every_steps=1)  # type: ignore[arg-type]
    ema.begin()
    state = ema.state_dict()
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert state["0.weight"] is state["1.weight"]
    again = Ema(model, Stepping(), decay=0.5, every_steps=1)  # type: ignore[arg-type]
    again.load_state_dict(state)
    assert list(again.shadows) == ["0.weight", "0.bias", "1.bias"]
