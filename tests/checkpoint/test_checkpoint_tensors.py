"""The files are safetensors files: others read ours, we read others'."""

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_states import DTYPES, raw_bytes, tensor_of
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.checkpoint import DamagedError
from disttrain.checkpoint.stored import TensorReader
from disttrain.checkpoint.tensors import AS_BYTES, check_dtypes, little_endian_bytes, write_tensors
from disttrain.checkpoint.tree import dtype_name
from disttrain.errors import CheckpointError

COMMON = [dtype for dtype in DTYPES if dtype_name(dtype) not in AS_BYTES]


def examples() -> dict[str, torch.Tensor]:
    found = {f"{dtype_name(d)}.{n}": tensor_of(d, s) for d in COMMON for n, s in enumerate([[], [0], [3], [2, 3]])}
    found["not contiguous"] = torch.arange(12.0).reshape(3, 4).T[::2]
    found['name with ünïcode and "quotes"'] = torch.ones(1)
    return found


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    expected = examples()
    size, sha256 = write_tensors(path, expected)
    assert (size, sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    read = safetensors.torch.load_file(path)
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw_bytes(read[name]) == raw_bytes(tensor), name


def test_what_the_safetensors_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    expected = {name: tensor.contiguous() for name, tensor in examples().items()}
    safetensors.torch.save_file(expected, path)
    with TensorReader(path) as reader:
        for name, tensor in expected.items():
            assert raw_bytes(reader.fetch(name, dtype_name(tensor.dtype), tuple(tensor.shape))) == raw_bytes(tensor)


def test_every_tensor_lies_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, examples())
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    for name, tensor in examples().items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.itemsize == 0, name


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = examples()
    one = write_tensors(tmp_path / "1", tensors)
    two = write_tensors(tmp_path / "2", dict(reversed(tensors.items())))
    assert one == two


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("dtype", "shape"), [("float32", (3, 2)), ("float64", (2, 3)), ("complex128", (2, 3))])
def test_a_tensor_of_another_dtype_or_shape_is_refused(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    write_tensors(tmp_path / "t", {"a": torch.ones(2, 3)})
    with TensorReader(tmp_path / "t") as reader, pytest.raises(DamagedError, match="a should be"):
        reader.fetch("a", dtype, shape)


def test_raw_bytes_that_do_not_fill_their_shape_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", {"a": torch.ones(17, dtype=torch.uint8)})
    with TensorReader(tmp_path / "t") as reader, pytest.raises(DamagedError, match="too few or too many bytes"):
        reader.fetch("a", "complex128", (1,))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(2)})
    with TensorReader(tmp_path / "t.safetensors") as reader, pytest.raises(DamagedError, match=r"t\.safetensors .*'b'"):
        reader.fetch("b", "float32", (2,))


HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]),
    st.one_of(
        st.integers(),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BOOL", "F4", "F8_E8M0", "C64", "I64", "X", "F6_E2M3"]),
                "shape": st.lists(st.integers(0, 2**63), max_size=3),
                "data_offsets": st.lists(st.integers(0, 2**63), min_size=1, max_size=3),
            }
        ),
    ),
    max_size=2,
)


def as_file(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


FILES = st.one_of(
    st.binary(max_size=64),
    st.builds(lambda size, rest: size.to_bytes(8, "little") + rest, st.integers(0, 2**64 - 1), st.binary(max_size=64)),
    st.builds(as_file, HEADERS.map(lambda header: json.dumps(header).encode()), st.binary(max_size=16)),
)


@given(content=FILES)
@settings(max_examples=200, deadline=None)
def test_any_file_is_read_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(content)
    try:
        with TensorReader(path) as reader:
            tensor = reader.fetch("a", "float32", (8,))
    except DamagedError:
        return
    assert tensor.shape == (8,)


@pytest.mark.parametrize(("code", "num_bytes"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6), ("F8_E8M0", 8)])
def test_a_valid_file_with_a_dtype_that_is_not_ours_is_refused(code: str, num_bytes: int, tmp_path: Path) -> None:
    header = {"a": {"dtype": code, "shape": [8], "data_offsets": [0, num_bytes]}}
    (tmp_path / "t").write_bytes(as_file(json.dumps(header).encode(), bytes(num_bytes)))
    with pytest.raises(DamagedError, match="a"), TensorReader(tmp_path / "t") as reader:
        reader.fetch("a", "float32", (8,))
