"""The safetensors library reads the files, and the same tensors give the same bytes."""

import hashlib
import io
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_states import COMMON_DTYPES, raw_bytes, tensor_examples

from disttrain.checkpoint import tensor_writer
from disttrain.checkpoint.tensor_writer import check_dtypes, little_endian_bytes, send_tensors, write_tensors
from disttrain.errors import CheckpointError


def test_the_safetensors_library_reads_the_files(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    expected = tensor_examples(COMMON_DTYPES)
    size, sha256 = write_tensors(path, expected)
    assert (size, sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    read = safetensors.torch.load_file(path)
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw_bytes(read[name]) == raw_bytes(tensor), name


def test_every_tensor_lies_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, tensor_examples(COMMON_DTYPES))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    for name, tensor in tensor_examples(COMMON_DTYPES).items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.itemsize == 0, name


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = tensor_examples(COMMON_DTYPES)
    one = write_tensors(tmp_path / "1", tensors)
    two = write_tensors(tmp_path / "2", dict(reversed(tensors.items())))
    assert one == two


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("mine")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "t", {})
    assert (tmp_path / "t").read_text() == "mine"


def test_a_dtype_that_cannot_be_held_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"tensor a has dtype torch\.bits16"):
        check_dtypes({"a": torch.zeros(4, dtype=torch.uint8).view(torch.bits16)})


def test_bytes_are_little_endian_on_a_big_endian_machine_too() -> None:
    number = torch.tensor([1, 258], dtype=torch.int32)
    assert bytes(little_endian_bytes(number, "little")) == bytes([1, 0, 0, 0, 2, 1, 0, 0])
    assert bytes(little_endian_bytes(number, "big")) == bytes([0, 0, 0, 1, 0, 0, 1, 2])
    pair = torch.tensor([1 + 2j], dtype=torch.complex64)
    parts = [bytes(little_endian_bytes(part, "big")) for part in (torch.tensor([1.0]), torch.tensor([2.0]))]
    assert bytes(little_endian_bytes(pair, "big")) == b"".join(parts)


@pytest.mark.parametrize("piece_bytes", [1, 7, 2**20])
def test_the_size_of_the_pieces_changes_neither_the_bytes_nor_the_hash(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    tensors = {"a": torch.arange(10.0), "b": torch.arange(12, dtype=torch.int8).reshape(3, 4).T}
    expected = io.BytesIO()
    send_tensors(expected, tensors)
    monkeypatch.setattr(tensor_writer, "WRITE_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(tensor_writer, "WORTH_A_THREAD_BYTES", 4)  # pieces of 7 bytes are hashed by the thread
    file = io.BytesIO()
    size, sha256 = send_tensors(file, tensors)
    assert file.getvalue() == expected.getvalue()
    assert (size, sha256) == (len(file.getvalue()), hashlib.sha256(file.getvalue()).hexdigest())


def test_fetched_values_are_written_in_the_place_of_tensors_without_values() -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2, dtype=torch.int64)}
    without_values = {name: tensor.to("meta") for name, tensor in tensors.items()}
    expected, file = io.BytesIO(), io.BytesIO()
    assert send_tensors(expected, tensors) == send_tensors(file, without_values, tensors.__getitem__)
    assert file.getvalue() == expected.getvalue()
