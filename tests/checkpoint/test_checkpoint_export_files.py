"""The files of an export: shards with an index, a folder for transformers, a state_dict of torch.save."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from disttrain.checkpoint.export_files import shards_of, write_in_shards, write_pretrained, write_torch
from disttrain.errors import CheckpointError

TENSORS = {name: torch.arange(4.0) + number for number, name in enumerate("abc")}
DESCRIPTION = {"architecture": "Net", "config": {"model_type": "net", "width": 4}, "generation_config": {"top_k": 3}}


def test_a_shard_holds_as_much_as_asked_for_or_one_larger_tensor() -> None:
    assert shards_of(TENSORS, 100) == [["a", "b", "c"]]
    assert shards_of(TENSORS, 32) == [["a", "b"], ["c"]]
    assert shards_of(TENSORS, 1) == [["a"], ["b"], ["c"]]


def test_shards_and_their_index_are_what_the_format_says(tmp_path: Path) -> None:
    files = write_in_shards(tmp_path / "m.safetensors", TENSORS, TENSORS.__getitem__, 32)
    assert [name for name, _ in files] == ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 12, "total_size": 48}
    assert index["weight_map"] == {"a": files[0][0], "b": files[0][0], "c": files[1][0]}
    for name, file in index["weight_map"].items():
        assert torch.equal(safetensors.torch.load_file(tmp_path / file)[name], TENSORS[name])


def test_what_cannot_be_read_or_is_there_leaves_no_files(tmp_path: Path) -> None:
    def fails_late(name: str) -> Tensor:
        if name == "c":
            raise OSError("gone")
        return TENSORS[name]

    with pytest.raises(OSError, match="gone"):
        write_in_shards(tmp_path / "m.safetensors", TENSORS, fails_late, 32)
    with pytest.raises(OSError, match="gone"):
        write_pretrained(tmp_path / "folder", TENSORS, fails_late, DESCRIPTION, 32)
    assert os.listdir(tmp_path) == []
    (tmp_path / "m.safetensors.index.json").write_text("mine")
    with pytest.raises(CheckpointError, match=r"m\.safetensors\.index\.json is there already"):
        write_in_shards(tmp_path / "m.safetensors", TENSORS, TENSORS.__getitem__, 32)
    assert os.listdir(tmp_path) == ["m.safetensors.index.json"]


def test_a_folder_says_its_class_and_the_dtype_of_its_numbers(tmp_path: Path) -> None:
    halves = {"count": torch.tensor(3), **{name: tensor.bfloat16() for name, tensor in TENSORS.items()}}
    assert len(write_pretrained(tmp_path / "out", halves, halves.__getitem__, DESCRIPTION, 10**6)) == 1
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "generation_config.json", "model.safetensors"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"architectures": ["Net"], "dtype": "bfloat16", "model_type": "net", "width": 4}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"top_k": 3}
    older = {"architecture": "Net", "config": {"torch_dtype": "float32"}}  # of transformers before 4.56
    write_pretrained(tmp_path / "older", halves, halves.__getitem__, older, 10**6)
    config = json.loads((tmp_path / "older" / "config.json").read_text())
    assert config == {"architectures": ["Net"], "torch_dtype": "bfloat16"}


def test_a_state_dict_is_read_without_code_and_keeps_its_ties(tmp_path: Path) -> None:
    tied = TENSORS | {"d": TENSORS["a"]}
    [(name, size)] = write_torch(tmp_path / "m.pt", tied, tied.__getitem__)
    assert size == (tmp_path / name).stat().st_size
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    assert {key: value.tolist() for key, value in state.items()} == {key: v.tolist() for key, v in tied.items()}
    assert state["a"].data_ptr() == state["d"].data_ptr() != state["b"].data_ptr()
