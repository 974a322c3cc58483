"""Weights are read from a checkpoint of any run and from files, and nothing else of them is."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from disttrain.backend import Backend
from disttrain.backend.single import SingleBackend
from disttrain.checkpoint import MANIFEST, save, store_at, weights_of_checkpoint, weights_of_file
from disttrain.errors import CheckpointError, DamagedError


def single() -> Backend:
    return SingleBackend(torch.device("cpu"), 0)


def same(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_checkpoint_gives_the_modules_that_are_asked_for(tmp_path: Path) -> None:
    model, loss = nn.Linear(2, 3).state_dict(), {"centers": torch.ones(4)}
    path = save(tmp_path, 7, {"model": model, "loss": loss, "optimizer": {"state": {0: torch.ones(9)}}})
    weights = weights_of_checkpoint(store_at(tmp_path), "step-00000007", ["model", "loss", "step"], single())
    assert list(weights.modules) == ["model", "loss"]
    assert same(weights.modules["model"], model)
    assert same(weights.modules["loss"], loss)
    assert weights.manifest is not None
    assert weights.manifest.step == 7
    assert weights.sha256 == hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    only = weights_of_checkpoint(store_at(tmp_path), "step-00000007", ["model"], single())
    assert list(only.modules) == ["model"]


def test_the_parameters_are_those_of_the_evaluation_point(tmp_path: Path) -> None:
    state = {
        "model": {"weight": torch.zeros(2), "running": torch.ones(1)},
        "evaluation_point": {"weight": torch.ones(2)},
    }
    save(tmp_path, 1, state)
    weights = weights_of_checkpoint(store_at(tmp_path), "step-00000001", ["model"], single())
    assert same(weights.modules["model"], {"weight": torch.ones(2), "running": torch.ones(1)})


def test_a_checkpoint_of_a_loop_of_ones_own_may_hold_a_model_alone(tmp_path: Path) -> None:
    save(tmp_path, 1, nn.Linear(2, 1).state_dict())
    weights = weights_of_checkpoint(store_at(tmp_path), "step-00000001", ["model"], single())
    assert set(weights.modules["model"]) == {"weight", "bias"}


def test_a_damaged_checkpoint_is_named_and_left_where_it_is(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"model": {"weight": torch.ones(2)}})
    (path / "tensors.safetensors").write_bytes(b"nothing")
    with pytest.raises(DamagedError, match=r"tensors\.safetensors has 7 bytes"):
        weights_of_checkpoint(store_at(tmp_path), "step-00000001", ["model"], single())
    assert path.is_dir()


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
@pytest.mark.parametrize("linked", [False, True])
def test_files_of_either_format(tmp_path: Path, suffix: str, linked: bool) -> None:
    state = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).half().state_dict()
    path = real = tmp_path / f"weights.{suffix}"
    if linked:  # as in the cache of a hub
        real = tmp_path / "blob"
        path.symlink_to(real)
    if suffix == "safetensors":
        safetensors.torch.save_file(state, real)
    else:
        torch.save(state, real)
    weights = weights_of_file(path)
    assert same(weights.modules["model"], state)
    assert weights.modules["model"]["0.weight"].dtype == torch.float16
    assert weights.sha256 == hashlib.sha256(real.read_bytes()).hexdigest()
    assert weights.manifest is None


def test_an_index_of_several_files(tmp_path: Path) -> None:
    parts = {"model-1.safetensors": {"a": torch.ones(2)}, "model-2.safetensors": {"b": torch.zeros(3)}}
    for name, tensors in parts.items():
        safetensors.torch.save_file(tensors, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    by_name = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": by_name}))
    weights = weights_of_file(index)
    assert same(weights.modules["model"], {"a": torch.ones(2), "b": torch.zeros(3)})
    lines = [f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n" for name in parts]
    assert weights.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    for text, message in (
        ("[]", "is no index of safetensors files: TypeError"),
        ('{"weight_map": {"a": "../model-1.safetensors"}}', "expected the plain name of a file beside it"),
        ('{"weight_map": {"c": "model-1.safetensors"}}', "lists c, which none of its files holds"),
        ('{"weight_map": {"a": "model-3.safetensors"}}', r"model-3\.safetensors is missing"),
    ):
        index.write_text(text)
        with pytest.raises(DamagedError, match=message):
            weights_of_file(index)


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_file_may_keep_the_state_beside_other_things(tmp_path: Path, key: str) -> None:
    torch.save({key: {"weight": torch.ones(2)}, "epoch": 3}, tmp_path / "w.pt")
    assert same(weights_of_file(tmp_path / "w.pt").modules["model"], {"weight": torch.ones(2)})


def test_what_is_no_state_of_a_model_is_refused(tmp_path: Path) -> None:
    torch.save({"net": {"weight": torch.ones(2)}, "epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(DamagedError, match=r"holds no state of a model: .* got net, epoch"):
        weights_of_file(tmp_path / "w.pt")
    torch.save(nn.Linear(2, 1), tmp_path / "pickle.pt")  # a whole module, which only running its code could load
    with pytest.raises(DamagedError, match="something else than tensors and plain values"):
        weights_of_file(tmp_path / "pickle.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(DamagedError, match="is not a safetensors file"):
        weights_of_file(tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot read .*gone\.pt: No such file"):
        weights_of_file(tmp_path / "gone.pt")
