"""A new run begins with the weights that `init_from` names: on any number of ranks, with either strategy."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from ranks import Ranks
from small_run import console, net, points, printed, single, small_config, small_run, trained
from torch import Tensor, nn

from disttrain.backend import Backend
from disttrain.checkpoint.export_files import write_in_shards
from disttrain.config import InitFromConfig
from disttrain.errors import ConfigError
from disttrain.evidence import params_sha256
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.initial_weights import InitialWeights, Taken, modules_of
from disttrain.run.train import train


def taken(folder: Path, path: object, model: Callable[[], nn.Module] = net, **fields: Any) -> tuple[nn.Module, Taken]:
    """Return a model that has taken the weights at `path`, and the report."""
    changes = {"loss": fields.pop("loss")} if "loss" in fields else {}
    run = small_run(folder / "unused", model=model, **changes)
    report = InitialWeights(InitFromConfig(path=str(path), **fields)).take(run.step_function, single())
    return run.step_function, report


class Tied(nn.Module):
    """A model whose embedding and output are one tensor."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3, bias=False)
        self.out = nn.Linear(3, 3, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x)).sum(1, keepdim=True)


class Centers(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.zeros(1))

    def forward(self, y_pred: Tensor, y: Tensor) -> Tensor:
        return (y_pred - y - self.center).square().mean()


def test_a_new_run_has_the_bits_of_the_weights_that_it_takes(tmp_path: Path) -> None:
    first = trained(tmp_path / "a", max_epochs=1)
    source = tmp_path / "a" / "small"
    model, report = taken(tmp_path, source)
    assert params_sha256(model.model) == first["params_sha256"]  # type: ignore[arg-type]
    assert report.text() == f"begins with {source}, step 4: 9 tensors taken"


def test_half_precision_becomes_float32_exactly_and_a_file_needs_one_name_of_a_tie(tmp_path: Path) -> None:
    weight = torch.tensor([[0.1, 0.2, 0.3]] * 3).half()
    safetensors.torch.save_file({"embed.weight": weight}, tmp_path / "half.safetensors")
    model, report = taken(tmp_path, tmp_path / "half.safetensors", Tied)
    assert torch.equal(model.model.out.weight, weight.float())  # type: ignore[union-attr]
    assert report.missing == []
    with pytest.raises(ConfigError, match=r"no out\.weight"):
        taken(tmp_path, tmp_path / "half.safetensors", partial(Tied, False))


def test_two_names_of_one_tensor_must_not_differ(tmp_path: Path) -> None:
    torch.save(Tied().state_dict(), tmp_path / "tied.pt")
    model, _ = taken(tmp_path, tmp_path / "tied.pt", partial(Tied, False))
    assert torch.equal(model.model.out.weight, model.model.embed.weight)  # type: ignore[union-attr]
    torch.save(Tied(tied=False).state_dict(), tmp_path / "untied.pt")
    with pytest.raises(ConfigError, match=r"embed\.weight and out\.weight are one tensor in this model, but differ"):
        taken(tmp_path, tmp_path / "untied.pt", Tied)
    taken(tmp_path, tmp_path / "untied.pt", Tied, skip="out.")


def test_a_loss_with_parameters_is_taken_from_a_run_and_left_alone_by_a_file(tmp_path: Path) -> None:
    trained(tmp_path / "a", loss=Centers(), max_epochs=1)
    model, report = taken(tmp_path, tmp_path / "a" / "small", loss=Centers())
    assert "loss.center" in report.taken
    assert float(model.loss.center.detach()) != 0.0  # type: ignore[union-attr]
    torch.save(net().state_dict(), tmp_path / "net.pt")
    model, report = taken(tmp_path, tmp_path / "net.pt", loss=Centers())
    assert "the loss, which is not there, begins as the config makes it" in report.text()
    assert float(model.loss.center.detach()) == 0.0  # type: ignore[union-attr]
    _, report = taken(tmp_path, tmp_path / "a" / "small", loss=Centers(), skip="loss.")
    assert report.skipped == ["loss.center"]


def test_what_is_not_taken_is_reported_and_refused_unless_it_is_listed(tmp_path: Path) -> None:
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 7), nn.Linear(7, 1))
    torch.save(other.state_dict(), tmp_path / "other.pt")
    path = tmp_path / "other.pt"
    with pytest.raises(ConfigError) as caught:
        taken(tmp_path, path)
    assert str(caught.value) == (
        f"init_from={path}: expected the weights of this model, got 2.weight is [7, 4] there and [1, 4] here; 2.bias "
        "is [7] there and [1] here; map other names by init_from.rename, list what the model is to begin itself, such "
        "as init_from.skip=2.weight, or take what fits by init_from.strict=false"
    )
    model, report = taken(tmp_path, path, skip="2.")
    assert report.text() == (
        f"begins with {path}: 7 tensors taken; 2 as the model builds them (init_from.skip): 2.weight, 2.bias; 2 left "
        "over there: 3.weight, 3.bias"
    )
    assert torch.equal(model.model[0].weight, other[0].weight)  # type: ignore[index]
    _, report = taken(tmp_path, path, strict=False)
    assert report.misfits == ["2.weight is [7, 4] there and [1, 4] here", "2.bias is [7] there and [1] here"]


def test_nothing_that_fits_is_refused_even_without_strict_and_a_renaming_is_proposed(tmp_path: Path) -> None:
    torch.save(nn.Sequential(net()).state_dict(), tmp_path / "wrapped.pt")
    with pytest.raises(
        ConfigError, match=r"got nothing that fits: it holds 0\.0\.weight, .* init_from\.rename=\{'0\.': ''\}$"
    ):
        taken(tmp_path, tmp_path / "wrapped.pt", strict=False)
    taken(tmp_path, tmp_path / "wrapped.pt", rename={"0.": ""})


def test_numbers_of_another_kind_are_refused(tmp_path: Path) -> None:
    state = net().state_dict()
    state["0.bias"] = torch.ones(4, dtype=torch.int64)
    torch.save(state, tmp_path / "integers.pt")
    with pytest.raises(ConfigError, match=r"0\.bias is int64 there and float32 here"):
        taken(tmp_path, tmp_path / "integers.pt")


def test_buffers_are_taken_and_the_modules_of_a_step_are_those_with_a_state(tmp_path: Path) -> None:
    state = net().state_dict()
    state["1.running_mean"] = torch.arange(4.0)
    torch.save(state, tmp_path / "net.pt")
    model, _ = taken(tmp_path, tmp_path / "net.pt")
    assert torch.equal(model.model[1].running_mean, torch.arange(4.0))  # type: ignore[index]
    assert list(modules_of(small_run(tmp_path / "r", loss=Centers()).step_function)) == ["model", "loss"]
    assert list(modules_of(small_run(tmp_path / "r").step_function)) == ["model"]


def test_a_compiled_model_takes_them_too(tmp_path: Path) -> None:
    torch.save(net().state_dict(), tmp_path / "net.pt")
    fields: dict[str, Any] = {"init_from": tmp_path / "net.pt", "max_epochs": 1}
    trained(tmp_path / "a", model=lambda: torch.compile(net(), backend="eager"), **fields)
    trained(tmp_path / "b", model=net, **fields)
    files = [tmp_path / name / "small/checkpoints/step-00000004/tensors.safetensors" for name in "ab"]
    compiled, eager = map(safetensors.torch.load_file, files)
    for name in net().state_dict():
        assert torch.equal(compiled[f"model.{name}"], eager[f"model.{name}"]), name
    assert len(json.loads((tmp_path / "a/small/init_from.json").read_text())["taken"]) == 9


def test_a_schedule_free_source_gives_the_weights_that_were_evaluated(tmp_path: Path) -> None:
    class Apart(torch.optim.SGD):
        """Evaluates at twice the weights that it trains."""

        def eval(self) -> None:
            self.move(2.0)

        def train(self) -> None:
            self.move(0.5)

        @torch.no_grad()
        def move(self, factor: float) -> None:
            if self.defaults.setdefault("at", 2.0) != factor:
                self.defaults["at"] = factor
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(factor)

    linear = partial(nn.Linear, 3, 1)
    trained(tmp_path / "a", model=linear, optimizer=partial(Apart, lr=0.1), max_epochs=1)
    resumed = small_run(tmp_path / "b", model=linear)
    source = tmp_path / "a" / "small" / "checkpoints" / "step-00000004" / "tensors.safetensors"
    stored = safetensors.torch.load_file(source)
    model, _ = taken(tmp_path, tmp_path / "a" / "small", linear)
    assert torch.equal(model.model.weight, stored["evaluation_point.weight"])  # type: ignore[union-attr, arg-type]
    assert torch.equal(stored["evaluation_point.weight"], 2 * stored["model.weight"])
    assert resumed.taken is None


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_source_with_an_average_gives_the_weights_that_were_evaluated(tmp_path: Path, evaluate: bool) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, y_pred: Tensor, y: Tensor) -> Tensor:
            return (self.scale * y_pred - y).square().mean()

    linear = partial(nn.Linear, 3, 1)
    trained(tmp_path / "a", model=linear, loss=Scaled(), ema={"decay": 0.5, "evaluate": evaluate}, max_epochs=1)
    source = tmp_path / "a" / "small" / "checkpoints" / "step-00000004" / "tensors.safetensors"
    stored = safetensors.torch.load_file(source)
    step_function, _ = taken(tmp_path, tmp_path / "a" / "small", linear, loss=Scaled())
    for name, tensor in step_function.state_dict().items():
        here = stored[f"kept.ema.{name}"] if evaluate else stored[name]
        assert torch.equal(tensor, here), name
    assert not torch.equal(stored["kept.ema.loss.scale"], stored["loss.scale"])


CHANGES: dict[str, Any] = {
    "train_data": partial(points, 48),
    "optimizer": partial(torch.optim.AdamW, lr=0.01),
    "global_batch_size": 16,
    "num_slots": 8,
    "max_epochs": 1,
    "ledger": {"every_steps": 1},
}


def begin(backend: Backend, folder: Path, source: str, strategy: str) -> str:
    config = small_config(**CHANGES, strategy=strategy, init_from={"path": source, "rename": {"body.": ""}})
    to = console()
    with Preemption() as preemption:
        train(config, backend, RunDirectory(folder / "small"), to, preemption)
    return printed(to)


@pytest.mark.parametrize(
    ("world_size", "strategy", "file"),
    [(3, "ddp", "w.pt"), (3, "fsdp", "w.pt"), (2, "fsdp", ""), pytest.param(8, "ddp", "w.pt", marks=pytest.mark.slow)],
)
def test_the_bits_are_those_of_a_model_that_holds_them_on_any_number_of_ranks(
    tmp_path: Path, ranks: Ranks, world_size: int, strategy: str, file: str
) -> None:
    torch.manual_seed(99)
    weights = net().state_dict()
    stored = {f"body.{name}": value for name, value in weights.items()}
    torch.save(stored, tmp_path / "w.pt")
    write_in_shards(tmp_path / "model.safetensors", stored, stored.__getitem__, 50)  # a folder, as of a hub

    def holds_them() -> nn.Module:
        model = net()
        model.load_state_dict(weights)
        return model

    trained(tmp_path / "whole", **CHANGES, model=holds_them)
    shown = ranks(world_size, begin, tmp_path, str(tmp_path / file), strategy, timeout_s=120)
    assert "9 tensors taken" in shown[0]
    ledger = (tmp_path / "small" / "ledger.jsonl").read_text()
    assert ledger == (tmp_path / "whole" / "small" / "ledger.jsonl").read_text()
