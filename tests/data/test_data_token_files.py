"""Windows of token files: arithmetic over positions, the same in any worker, at no cost for the size of the files."""

import os
import pickle
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.data import LoadingError, SlotBatchSampler, SlotLoader, TokenFiles, check_dataset
from disttrain.errors import DataError

NUM_TOKENS = 10**11


def written(path: Path, tokens: object, dtype: str = "uint16") -> Path:
    np.asarray(tokens, dtype).tofile(path)
    return path


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    """Return a file of 10**11 tokens, of which only the last 1000 take room on the disk: 0, 1, 2, ..."""
    path = tmp_path / "huge.bin"
    path.touch()
    os.truncate(path, 2**24)  # a file system without sparse files would write this
    if path.stat().st_blocks * 512 > 2**20:
        pytest.skip("the file system has no sparse files")
    try:
        os.truncate(path, 2 * NUM_TOKENS)
    except OSError as error:
        pytest.skip(f"the file system has no file of 200 GB: {error}")
    with path.open("r+b") as file:
        file.seek(2 * (NUM_TOKENS - 1000))
        file.write(np.arange(1000, dtype="uint16").tobytes())
    return path


@settings(deadline=None, max_examples=40)
@given(num_tokens=st.integers(2, 60), length=st.integers(1, 12))
def test_windows_are_the_row_cut_into_inputs_and_targets(
    tmp_path_factory: pytest.TempPathFactory, num_tokens: int, length: int
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    paths = [
        written(folder / "a.bin", range(num_tokens // 2)),
        written(folder / "b.bin", range(num_tokens // 2, num_tokens)),
    ]
    if num_tokens < length + 1:
        with pytest.raises(
            DataError, match=rf"at least length \+ 1 = {length + 1} tokens, got {num_tokens} in 2 files"
        ):
            TokenFiles(paths, length, dtype="uint16")
        return
    data = TokenFiles(paths, length, dtype="uint16")
    inputs, targets = zip(*data, strict=True)
    covered = len(data) * length
    assert num_tokens - 1 - length < covered <= num_tokens - 1
    assert torch.cat(inputs).tolist() == list(range(covered))
    assert torch.cat(targets).tolist() == list(range(1, covered + 1))
    assert {(t.dtype, t.shape) for t in (*inputs, *targets)} == {(torch.int64, (length,))}


def test_negative_numbers_count_from_the_end_and_others_are_refused(tmp_path: Path) -> None:
    data = TokenFiles(written(tmp_path / "a.bin", range(10)), 3, dtype="uint16")
    assert data[-1][0].tolist() == data[np.int64(2)][0].tolist() == [6, 7, 8]
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"expected a window below 3, got {index}"):
            data[index]
    with pytest.raises(ValueError, match="length=0: expected a window of at least 1 token"):
        TokenFiles(tmp_path / "a.bin", 0, dtype="uint16")


def test_a_token_outside_the_vocabulary_names_file_and_place(tmp_path: Path) -> None:
    paths = [written(tmp_path / "a.bin", range(5)), written(tmp_path / "b.bin", [5, 6, 50000, 8])]
    assert TokenFiles(paths, 4, dtype="uint16")[1][0].tolist() == [4, 5, 6, 50000]
    data = TokenFiles(paths, 4, dtype="uint16", vocab_size=100)
    assert data[0][0].tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"b.bin: expected tokens in 0..99, got 50000 at position 2; compare .*uint16"):
        data[1]


def test_workers_load_the_same_windows(tmp_path: Path) -> None:
    paths = [written(tmp_path / f"{number}.bin", range(number, number + 50)) for number in range(4)]
    data = TokenFiles(paths, 7, dtype="uint16")
    data[0]  # opened here, before the workers are forked
    batches = []
    for num_workers in (0, 2):
        loader = SlotLoader(data, SlotBatchSampler(len(data), 8, 2, seed=3), num_workers=num_workers)
        batches.append([torch.stack(pair) for step in loader for pair in step])
        loader.close()
    assert all(torch.equal(one, other) for one, other in zip(*batches, strict=True))


def test_a_file_cut_short_ends_a_worker_with_one_line(tmp_path: Path) -> None:
    path = written(tmp_path / "a.bin", range(50))
    data = TokenFiles(path, 4, dtype="uint16")
    os.truncate(path, 60)
    loader = SlotLoader(data, SlotBatchSampler(len(data), 4, 2), num_workers=1)
    with pytest.raises(
        LoadingError, match=r"^dataset\[\d+\] raised DataError: .*a.bin: expected 100 bytes.*got 60"
    ) as raised:
        next(iter(loader))
    assert "\n" not in str(raised.value)


def test_a_run_is_bound_to_its_files(tmp_path: Path) -> None:
    path = written(tmp_path / "a.bin", range(50))
    identity = check_dataset(TokenFiles(path, 4, dtype="uint16"))
    assert identity["dataset_length"] == 12
    assert check_dataset(pickle.loads(pickle.dumps(TokenFiles(path, 4, dtype="uint16")))) == identity
    others = [
        TokenFiles(path, 5, dtype="uint16"),
        TokenFiles(path, 4, dtype="int16"),
        TokenFiles([path, path], 4, dtype="uint16"),
    ]
    assert len({check_dataset(data)["dataset_fingerprint"] for data in others} | {identity["dataset_fingerprint"]}) == 4


def test_windows_of_100_billion_tokens_take_no_memory(huge: Path) -> None:
    tracemalloc.start()
    try:
        data = TokenFiles(huge, 999, dtype="uint16")
        assert len(data) == (NUM_TOKENS - 1) // 999
        last = data[(NUM_TOKENS - 1000) // 999][0]  # the last 1000 tokens count up
        first = (NUM_TOKENS - 1000) // 999 * 999 - (NUM_TOKENS - 1000)
        assert last.tolist() == [max(0, token) for token in range(first, first + 999)]
        sampler = SlotBatchSampler(len(data), 64, 4, seed=1)
        loader = SlotLoader(data, sampler)
        loader.seek(epoch=3, step=sampler.num_steps - 1)
        batch = next(iter(loader))
        assert [pair[0].shape for pair in batch] == [(16, 999)] * 4
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the memory of a process is read from /proc")
def test_a_process_that_reads_far_positions_does_not_grow(huge: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    data = TokenFiles(huge, 1024, dtype="uint16")
    data[0]
    before = resident()
    for index in np.linspace(0, len(data) - 1, 4000).astype(int):  # 8 MB of tokens, of 20 GB of pages
        data[index]
    assert resident() - before < 4 * 2**20
