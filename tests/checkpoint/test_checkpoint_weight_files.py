"""Files of weights: what is read of them, by which rank, and how they are hashed."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from ranks import Ranks
from torch import Tensor

from disttrain.backend import Backend
from disttrain.checkpoint import Weights, weight_files, weights_of_file
from disttrain.checkpoint.tensor_reader import TensorReader
from disttrain.checkpoint.weight_files import WeightFiles
from disttrain.errors import DamagedError


def sharded(folder: Path, *, kind: str = "safetensors") -> dict[str, Tensor]:
    """Write tensors into two files with an index, as a hub has them."""
    tensors = {name: torch.randn(7, 4, generator=torch.Generator().manual_seed(n)) for n, name in enumerate("abc")}
    start = "model" if kind == "safetensors" else "pytorch_model"
    by_name = {}
    for number, names in enumerate(("ab", "c"), 1):
        file = f"{start}-{number:05d}-of-00002.{kind}"
        part = {name: tensors[name] for name in names}
        (safetensors.torch.save_file if kind == "safetensors" else torch.save)(part, folder / file)
        by_name |= dict.fromkeys(names, file)
    (folder / f"{start}.{kind}.index.json").write_text(json.dumps({"weight_map": by_name}))
    return tensors


def test_the_contents_have_no_values_and_a_box_is_read_alone(tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    files = WeightFiles(tmp_path / "model.safetensors.index.json")
    assert {name: (each.is_meta, each.shape) for name, each in files.contents.items()} == {
        name: (True, each.shape) for name, each in tensors.items()
    }
    assert torch.equal(files.read("b", (2, 4), (3, 0)), tensors["b"][3:5])
    files.close()


def test_several_files_of_torch_save(tmp_path: Path) -> None:
    tensors = sharded(tmp_path, kind="bin")
    found = weights_of_file(tmp_path / "pytorch_model.bin.index.json").modules["model"]
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"is no index of files of torch\.save: KeyError"):
        WeightFiles(tmp_path / "pytorch_model.bin.index.json")


def test_only_what_is_chosen_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path)
    read: list[int] = []
    reading = TensorReader.read

    def counted(self: TensorReader, start: int, shape: Any, offsets: Any, into: Tensor) -> None:
        read.append(into.nbytes)
        reading(self, start, shape, offsets, into)

    monkeypatch.setattr(TensorReader, "read", counted)
    found = weights_of_file(tmp_path / "model.safetensors.index.json", choose=lambda _: {"model": {"c": None}})
    assert list(found.modules["model"]) == ["c"]
    assert read == [7 * 4 * 4]


def read_a_part(backend: Backend, file: str) -> dict[str, Any]:
    """Read this rank's rows of every tensor; return them, the bytes that were read, and the files that were hashed."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard

    assert backend.process_group is not None
    mesh = DeviceMesh.from_group(backend.process_group, "cpu")
    hashed: list[str] = []
    hashing = weight_files._sha256_of

    def noted(path: Path) -> str:
        hashed.append(path.name)
        return hashing(path)

    def choose(contents: Weights) -> Any:
        return {"model": dict.fromkeys(contents.modules["model"], (mesh, [Shard(0)]))}

    weight_files._sha256_of = noted
    try:
        found = weights_of_file(Path(file), backend, choose)
    finally:
        weight_files._sha256_of = hashing
    local: dict[str, Any] = {name: value.to_local() for name, value in found.modules["model"].items()}
    return {"local": local, "hashed": hashed, "sha256": found.sha256}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_each_rank_reads_its_rows_and_hashes_its_share(tmp_path: Path, ranks: Ranks, kind: str) -> None:
    tensors = sharded(tmp_path, kind=kind)
    [index] = tmp_path.glob("*.index.json")
    by_rank = ranks(3, read_a_part, str(index))
    for name, tensor in tensors.items():
        assert [len(each["local"][name]) for each in by_rank] == [3, 3, 1]
        assert torch.equal(torch.cat([each["local"][name] for each in by_rank]), tensor)
    files = sorted(path.name for path in tmp_path.glob(f"*.{kind}"))
    assert sorted(name for each in by_rank for name in each["hashed"]) == files
    lines = "".join(f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}\n" for name in files)
    assert {each["sha256"] for each in by_rank} == {hashlib.sha256(lines.encode()).hexdigest()}


def test_a_file_that_vanishes_is_an_error(tmp_path: Path) -> None:
    sharded(tmp_path)
    files = WeightFiles(tmp_path / "model.safetensors.index.json")
    for file in files.files:
        os.unlink(file)
    with pytest.raises(DamagedError, match=r"model-00002-of-00002\.safetensors is missing"):
        files.read("c", (7, 4), (0, 0))
