"""Token files are read by position as one row; a file that is not what it should be is one error with its name."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.data.token_reader import MOST_OPEN, TokenReader
from disttrain.errors import DataError

DTYPES = ("uint8", "int8", "<u2", ">u2", "int32", ">i4", "uint32", "int64", "uint64")


def raw(path: Path, tokens: object, dtype: str = "uint16") -> Path:
    np.asarray(tokens, dtype).tofile(path)
    return path


def saved(path: Path, tokens: object, dtype: str = "int64") -> Path:
    np.save(path, np.asarray(tokens, dtype))
    return path


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    header=st.integers(0, 5),
    data=st.data(),
)
def test_any_cut_of_the_tokens_into_files_reads_as_one_row(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], dtype: str, header: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    row = np.arange(sum(lengths)) * 2
    paths = []
    for number, part in enumerate(np.split(row, np.cumsum(lengths)[:-1])):
        if data.draw(st.booleans(), label="npy"):
            paths.append(saved(folder / f"{number}.npy", part, dtype))
        else:
            paths.append(folder / f"{number}.bin")
            paths[-1].write_bytes(b"\xff" * header + part.astype(dtype).tobytes())
    reader = TokenReader(paths, dtype, header)
    assert len(reader) == len(row)
    start = data.draw(st.integers(0, len(row)))
    stop = data.draw(st.integers(start, len(row)))
    read = reader.read(start, stop)
    assert read.dtype == np.int64
    assert read.tolist() == row[start:stop].tolist()
    assert list(reader) == row.tolist()


def test_a_pattern_gives_its_files_in_sorted_order(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        raw(tmp_path / f"part-{number}.bin", [number])
    raw(tmp_path / "other.bin", [9])
    assert list(TokenReader(str(tmp_path / "part-*.bin"), "uint16")) == [0, 1, 2]
    assert list(TokenReader([tmp_path / "other.bin", str(tmp_path / "part-[12].bin")], "uint16")) == [9, 1, 2]
    raw(tmp_path / "odd[1].bin", [7])  # a file's own name comes first
    assert list(TokenReader(tmp_path / "odd[1].bin", "uint16")) == [7]


def test_nothing_is_opened_before_a_token_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(str(path)) or real(path, *rest))
    paths = [raw(tmp_path / f"{number}.bin", [number, number]) for number in range(3)]
    reader = TokenReader(paths, "uint16")
    assert opened == []
    assert reader.read(3, 5).tolist() == [1, 2]
    assert opened == [str(path) for path in paths[1:]]
    there = pickle.loads(pickle.dumps(reader))
    assert there.read(3, 5).tolist() == [1, 2]
    assert len(opened) == 2  # the readers of a process share what is open


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the open files of a process are counted in /proc")
def test_only_so_many_files_are_open_at_a_time(tmp_path: Path) -> None:
    num_files = 3 * MOST_OPEN
    paths = [raw(tmp_path / f"{number:03}.bin", [number]) for number in range(num_files)]
    reader = TokenReader(paths, "uint16")
    readers_of_one = [TokenReader(path, "uint16") for path in paths]
    before = len(os.listdir("/proc/self/fd"))
    assert list(reader) == list(range(num_files))
    assert [list(each) for each in readers_of_one] == [[number] for number in range(num_files)]
    assert len(os.listdir("/proc/self/fd")) == before + MOST_OPEN
    del reader, readers_of_one
    assert len(os.listdir("/proc/self/fd")) == before


def bad_header(path: Path) -> Path:
    path.write_bytes(b"\x93NUMPY\x01\x00\x04\x00nope")
    return path


def cut(path: Path, size: int) -> Path:
    os.truncate(path, size)
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("make", "dtype", "message"),
    [
        (lambda at: at / "gone.bin", "uint16", "gone.bin: expected a token file, got nothing"),
        (lambda at: folder(at / "a"), "uint16", "a: expected a token file, got a folder"),
        (lambda at: Path(os.devnull), "uint16", f"{os.devnull}: expected a token file, got something else"),
        (lambda at: at / "*.bin", "uint16", r"\*.bin: expected token files of this pattern, got none"),
        (lambda at: [], "uint16", "expected at least one token file, got an empty list"),
        (lambda at: raw(at / "a.bin", [1]), None, "a.bin: expected a dtype, got none; say how its tokens are stored"),
        (lambda at: raw(at / "a.npy", [1]), None, "a.npy: expected a file of numpy.save, got one without its header"),
        (lambda at: cut(raw(at / "a.bin", [1, 2]), 3), "uint16", r"whole tokens of 2 bytes \(uint16\), got 3 bytes"),
        (
            lambda at: saved(at / "a.npy", [1], "uint32"),
            "uint16",
            "expected tokens of dtype=uint16, got a .npy file of u",
        ),
        (lambda at: saved(at / "a.npy", [1.5], "float64"), None, "expected tokens of an integer type.*, got float64"),
        (
            lambda at: saved(at / "a.npy", [[1], [2]]),
            None,
            r"an array of one dimension, got \(2, 1\); save array.ravel",
        ),
        (lambda at: cut(saved(at / "a.npy", [1, 2]), 140), None, "expected 144 bytes, got 140; the file was cut short"),
        (lambda at: bad_header(at / "a.npy"), None, "a.npy: expected the header of a .npy file, got "),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_named(
    tmp_path: Path, make: Callable[[Path], Path], dtype: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message) as raised:
        TokenReader(make(tmp_path), dtype)
    assert "\n" not in str(raised.value)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    path = raw(tmp_path / "a.bin", [1, 2])
    with pytest.raises(ValueError, match="dtype='float32': expected tokens of an integer type"):
        TokenReader(path, "float32")
    with pytest.raises(ValueError, match="header_bytes=-1: expected 0 or more bytes"):
        TokenReader(path, "uint16", -1)
    with pytest.raises(DataError, match=r"whole tokens of 2 bytes \(uint16\) after header_bytes=5, got 4 bytes"):
        TokenReader(path, "uint16", 5)
    with pytest.raises(IndexError, match=r"position in 0..1, got 2"):
        TokenReader(path, "uint16")[2]


@pytest.mark.parametrize("size", [0, 6, 100])
@pytest.mark.parametrize("is_open", [False, True])
def test_a_file_that_changes_its_size_is_an_error_at_the_next_read(tmp_path: Path, size: int, is_open: bool) -> None:
    path = raw(tmp_path / "a.bin", range(8))
    reader = TokenReader(path, "uint16")
    if is_open:
        assert reader[7] == 7
    os.truncate(path, size)
    expected = rf"a.bin: expected 16 bytes, as when the run began, got {size}; restore the file"
    with pytest.raises(DataError, match=expected):
        reader.read(0, 2)


def test_the_fingerprint_tells_names_sizes_types_and_order_apart(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    a, b = raw(tmp_path / "a.bin", [1, 2]), raw(tmp_path / "b.bin", [1, 2])
    moved = raw(tmp_path / "elsewhere" / "a.bin", [3, 4])  # contents are compared by samples, not here
    first = TokenReader([a, b], "uint16").fingerprint
    assert TokenReader([moved, b], "uint16").fingerprint == first
    others = [
        TokenReader([b, a], "uint16"),
        TokenReader([a], "uint16"),
        TokenReader([a, b], "uint8"),
        TokenReader([a, b], ">u2"),
        TokenReader([a, b], "uint16", 2),
        TokenReader([a, raw(tmp_path / "b.bin", [1, 2, 3])], "uint16"),
    ]
    assert len({first, *(reader.fingerprint for reader in others)}) == 7
