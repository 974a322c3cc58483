"""An export has the names of the model's state_dict, in the form that was asked for, or is nothing."""

import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_states import COMMON_DTYPES, raw_bytes, tensor_of
from checkpoint_strangers import victim_in_two
from torch import nn

from disttrain.checkpoint import CheckpointInfo, DamagedError, Exported, export, save
from disttrain.errors import CheckpointError


def tied_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def test_a_model_is_loaded_from_its_export(tmp_path: Path) -> None:
    model = tied_model()
    optimizer = torch.optim.AdamW(model.parameters())
    path = save(tmp_path / "c", 7, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 7})
    file = tmp_path / "model.safetensors"
    assert export(path, file) == Exported(7, len(model.state_dict()), file.stat().st_size)
    tensors = safetensors.torch.load_file(file)
    assert tensors.keys() == model.state_dict().keys()  # both names of the tied weight
    other = tied_model()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(tensors)
    assert torch.equal(other[2].weight, model[0].weight)


def test_every_dtype_of_the_format_is_exported_as_it_is(tmp_path: Path) -> None:
    state = {str(dtype): tensor_of(dtype, [2, 3]) for dtype in COMMON_DTYPES} | {"empty": torch.empty(0, 4)}
    export(save(tmp_path / "c", 1, {"model": state}), tmp_path / "m")
    for name, tensor in safetensors.torch.load_file(tmp_path / "m").items():
        assert (tensor.dtype, tensor.shape) == (state[name].dtype, state[name].shape)
        assert raw_bytes(tensor) == raw_bytes(state[name])


def test_a_checkpoint_of_two_ranks_is_exported_whole(tmp_path: Path) -> None:
    done = export(victim_in_two(tmp_path / "c"), tmp_path / "m")
    tensors = safetensors.torch.load_file(tmp_path / "m")
    assert done.num_tensors == len(tensors) == 3
    assert all(torch.equal(tensor, torch.ones(4)) for tensor in tensors.values())


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ({"a": torch.ones(1), "b": [torch.ones(2)]}, ["a", "b.0"]),  # no "model": all tensors
        ({"model": {"w": torch.ones(3), "extra": {"counts": np.zeros(2)}}}, ["extra.counts", "w"]),
        (torch.ones(3), ["tensor"]),  # the name that a tensor alone has in the checkpoint
    ],
)
def test_a_state_without_a_model_is_exported_with_all_its_tensors(tmp_path: Path, state: Any, names: list[str]) -> None:
    export(save(tmp_path / "c", 1, state), tmp_path / "m")
    assert sorted(safetensors.torch.load_file(tmp_path / "m")) == names


def test_an_export_that_is_refused_writes_nothing(tmp_path: Path) -> None:
    good = save(tmp_path / "c", 1, {"model": {"w": torch.ones(3)}})
    empty = save(tmp_path / "c", 2, {"model": {"n": 1}, "optimizer": torch.ones(1)})
    damaged = save(tmp_path / "c", 3, {"model": {"w": torch.ones(3)}})
    (damaged / "tensors.safetensors").write_bytes(b"")
    (tmp_path / "mine").write_text("mine")
    before = sorted(os.listdir(tmp_path))
    for directory, file, error, reason in (
        (good, "mine", CheckpointError, "mine is there already; remove it or choose another name"),
        (empty, "m", CheckpointError, "step-00000002 holds no tensors of a model"),
        (damaged, "m", DamagedError, "tensors.safetensors has 0 bytes"),
        (good, "absent/m", CheckpointError, "cannot write .*absent/m: No such file"),
    ):
        with pytest.raises(error, match=reason):
            export(directory, tmp_path / file)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    path = save(tmp_path / "c", 1, {"model": {"w": torch.ones(2**15)}})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*/m: "):
            export(path, tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["c"]


def tied_checkpoint(folder: Path, **position: Any) -> tuple[nn.Module, Path]:
    model = nn.ModuleDict({"net": tied_model(), "head": nn.Linear(3, 1)})
    return model, save(folder / "c", 4, {"model": model.state_dict()}, info=CheckpointInfo(position=position))


def test_a_folder_for_transformers_holds_a_tied_tensor_once(tmp_path: Path) -> None:
    described = {"architecture": "Net", "config": {"a": 1}, "tied": ["2.weight"]}
    model, path = tied_checkpoint(tmp_path, pretrained={"net": described})
    done = export(path, tmp_path / "out", form="hf", module="net")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert tensors.keys() == model["net"].state_dict().keys() - {"2.weight"}
    assert done.num_tensors == len(tensors)
    (tmp_path / "empty").mkdir()  # as one that was made for it
    assert export(path, tmp_path / "empty", form="hf", module="net", max_shard_bytes=40).num_files > 1
    apart = {**described, "tied": ["0.weight", "2.weight"]}  # nothing else would hold it
    _, path = tied_checkpoint(tmp_path / "apart", pretrained={"net": apart})
    export(path, tmp_path / "both", form="hf", module="net")
    assert {"0.weight", "2.weight"} <= safetensors.torch.load_file(tmp_path / "both" / "model.safetensors").keys()


def test_what_from_pretrained_could_not_load_is_refused(tmp_path: Path) -> None:
    described = {"architecture": "Net", "config": {}}
    _, plain = tied_checkpoint(tmp_path / "plain")
    _, inner = tied_checkpoint(tmp_path / "inner", pretrained={"net": described, "head": described})
    _, frozen = tied_checkpoint(tmp_path / "frozen", pretrained={"": described}, frozen_left_out={"model.x": "0"})
    _, odd = tied_checkpoint(tmp_path / "odd", pretrained={"": "no description"})
    for path, fields, reason in (
        (plain, {}, "its model is none, .*; use --format safetensors"),
        (inner, {}, "choose a module that is one: --module net, of net, head"),
        (frozen, {}, "leaves 1 frozen weights out, which from_pretrained would not find"),
        (odd, {}, "describes no model of transformers"),
        (
            inner,
            {"module": "tail"},
            r"the model has no module tail with tensors; its first modules are \['head', 'net'\]",
        ),
    ):
        with pytest.raises(CheckpointError, match=reason):
            export(path, tmp_path / "out", form="hf", **fields)
    assert not (tmp_path / "out").exists()


def test_numbers_are_converted_unless_they_would_become_infinite(tmp_path: Path) -> None:
    state = {"w": torch.tensor([1.0, 70000.0]), "n": torch.tensor(7), "h": torch.ones(2, dtype=torch.bfloat16)}
    path = save(tmp_path / "c", 1, {"model": state})
    export(path, tmp_path / "b", dtype="bfloat16")
    found = safetensors.torch.load_file(tmp_path / "b")
    assert {name: each.dtype for name, each in found.items()} == {
        **dict.fromkeys(("w", "h"), torch.bfloat16),
        "n": torch.int64,
    }
    assert torch.equal(found["w"], state["w"].bfloat16())
    with pytest.raises(CheckpointError, match="w holds numbers beyond those of float16"):
        export(path, tmp_path / "h", dtype="float16")
    with pytest.raises(CheckpointError, match="expected a dtype of float32, bfloat16, float16, float64, got int8"):
        export(path, tmp_path / "h", dtype="int8")
    assert not (tmp_path / "h").exists()


def test_torch_reads_an_export_and_keeps_its_ties(tmp_path: Path) -> None:
    model, path = tied_checkpoint(tmp_path)
    export(path, tmp_path / "m.pt", form="torch")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert state["net.0.weight"].data_ptr() == state["net.2.weight"].data_ptr()
