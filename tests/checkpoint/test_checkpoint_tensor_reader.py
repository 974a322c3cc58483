"""Any box of any tensor is read, files of the safetensors library too, and any other file is refused."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_states import COMMON_DTYPES, DTYPES, raw_bytes, tensor_examples, tensor_of
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.checkpoint import DamagedError, tensor_reader
from disttrain.checkpoint.state_tree import dtype_name
from disttrain.checkpoint.tensor_reader import TensorReader, dtype_of
from disttrain.checkpoint.tensor_writer import write_tensors


def test_a_file_of_the_safetensors_library_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    expected = {name: tensor.contiguous() for name, tensor in tensor_examples(COMMON_DTYPES).items()}
    safetensors.torch.save_file(expected, path)
    with TensorReader(path) as reader:
        for name, tensor in expected.items():
            assert raw_bytes(reader.fetch(name, dtype_name(tensor.dtype), tuple(tensor.shape))) == raw_bytes(tensor)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Return a shape, and the offsets and sizes of a box in it."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    offsets = [draw(st.integers(0, size - 1)) for size in shape]
    return shape, offsets, [draw(st.integers(1, size - start)) for size, start in zip(shape, offsets, strict=True)]


@given(
    box=boxes(),
    dtype=st.sampled_from(DTYPES),
    piece_bytes=st.sampled_from([1, 16, 2**20]),
    is_strided=st.booleans(),
)
@settings(max_examples=80, deadline=None)
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_any_box_has_the_values_of_a_slice(
    box: tuple[list[int], list[int], list[int]],
    dtype: torch.dtype,
    piece_bytes: int,
    is_strided: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    shape, offsets, sizes = box
    tensor, path = tensor_of(dtype, shape), tmp_path_factory.getbasetemp() / "boxes.safetensors"
    path.unlink(missing_ok=True)
    write_tensors(path, {"first": torch.ones(3), "t": tensor})
    into = torch.empty([2 * size for size in sizes] if is_strided else sizes, dtype=dtype)
    if is_strided:
        into = into[tuple(slice(0, None, 2) for _ in sizes)]
    with pytest.MonkeyPatch.context() as patch, TensorReader(path) as reader:
        patch.setattr(tensor_reader, "WRITE_PIECE_BYTES", piece_bytes)  # smaller and larger than a row
        reader.read(reader.find("t", dtype_name(dtype), tuple(shape)), shape, offsets, into)
    box_slices = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
    assert raw_bytes(into) == raw_bytes(tensor[box_slices])


def test_a_file_that_is_cut_off_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", {"a": torch.ones(100)})
    with TensorReader(tmp_path / "t") as reader:
        with (tmp_path / "t").open("r+b") as file:
            file.truncate(300)
        with pytest.raises(DamagedError, match="t was cut off while it was read"):
            reader.fetch("a", "float32", (100,))


def test_a_closed_file_is_opened_again_by_the_next_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", {"a": torch.arange(3)})
    reader = TensorReader(tmp_path / "t")
    for _ in range(2):
        assert torch.equal(reader.fetch("a", "int64", (3,)), torch.arange(3))
        reader.close()


def test_every_dtype_has_its_name_and_another_name_is_refused() -> None:
    assert [dtype_of(dtype_name(dtype)) for dtype in DTYPES] == DTYPES
    with pytest.raises(DamagedError, match="'float33', which no release writes"):
        dtype_of("float33")


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
def test_a_valid_file_with_a_dtype_that_no_release_writes_is_refused(code: str, num_bytes: int, tmp_path: Path) -> None:
    header = {"a": {"dtype": code, "shape": [8], "data_offsets": [0, num_bytes]}}
    (tmp_path / "t").write_bytes(as_file(json.dumps(header).encode(), bytes(num_bytes)))
    with pytest.raises(DamagedError, match="a"), TensorReader(tmp_path / "t") as reader:
        reader.fetch("a", "float32", (8,))
