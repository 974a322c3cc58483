"""Ranks compare a few samples before the first step, with each other and with the run's own."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from small_run import console, points, printed, small_config, small_run, trained
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from disttrain.backend import Backend
from disttrain.errors import DataError, RemoteError
from disttrain.run.assemble import assemble
from disttrain.run.directory import RunDirectory
from disttrain.run.resume import restore
from disttrain.run.samples import compare_samples
from disttrain.run.state import Run


class Noise(Dataset[Any]):
    """Points with noise from `draw`; the class notes how often a sample was loaded."""

    num_loaded = 0

    def __init__(self, draw: Any, num_samples: int = 32) -> None:
        self.draw, self.points = draw, points(num_samples)

    def __len__(self) -> int:
        return len(self.points)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        Noise.num_loaded += 1
        x, y = self.points[index]
        return x + self.draw(), y


ENTROPY = {
    "the system's entropy": random.SystemRandom().random,
    "a generator of its own": random.Random(7).random,
    "a counter": itertools.count().__next__,
}


def shifted(by: float) -> Dataset[Any]:
    """Return points with other labels, whose length and fingerprint are the same."""
    x, y = points().tensors  # type: ignore[attr-defined]
    return Wrapped(TensorDataset(x, y + by))


class Wrapped(Dataset[Any]):
    """A dataset of which only the length is known before a sample is loaded."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


@pytest.mark.parametrize("field", ["train_data", "valid_data"])
@pytest.mark.parametrize("source", ENTROPY)
def test_a_sample_that_varies_is_refused_on_one_rank_too(tmp_path: Path, field: str, source: str) -> None:
    changes: dict[str, Any] = {field: lambda: Noise(ENTROPY[source])}
    with pytest.raises(DataError, match=rf"^{field}\[31\] is another sample when it is loaded again \(rank 0\)"):
        restore(small_run(tmp_path, **changes), console())
    to = console()
    assert restore(small_run(tmp_path, deterministic=False, **changes), to) == 0
    assert f"WARNING: {field}[31] is another sample" in printed(to)


@pytest.mark.parametrize("draw", [random.random, torch.rand(1).item, lambda: torch.rand(()).item()])
def test_seeded_noise_is_the_same_each_time_and_costs_ten_samples(tmp_path: Path, draw: Any) -> None:
    Noise.num_loaded = 0
    run = small_run(tmp_path, train_data=lambda: Noise(draw), valid_data=lambda: Noise(draw))
    assert restore(run, console()) == 0
    assert len(run.samples) == 5
    assert Noise.num_loaded <= 10
    assert run.position()["samples"] == run.samples


def test_other_data_is_named_and_not_trained_on(tmp_path: Path) -> None:
    trained(tmp_path, max_epochs=1, train_data=lambda: shifted(0.0))
    begun = (tmp_path / "small" / "ledger.jsonl").read_text()
    with pytest.raises(DataError, match=r"changed since the run began: train_data\[0\] was \w{16} and is \w{16}"):
        trained(tmp_path, max_epochs=2, train_data=lambda: shifted(0.5))
    assert (tmp_path / "small" / "ledger.jsonl").read_text() == begun
    accepted = trained(tmp_path, max_epochs=2, train_data=lambda: shifted(0.5), accept_other_data=True)
    assert accepted["step"] == 8
    assert trained(tmp_path, max_epochs=3, train_data=lambda: shifted(0.5))["step"] == 12  # its own samples now


SHIFT = {0: 0.0}
"""A number outside the config, on which data may depend."""


def moving() -> Any:
    return shifted(SHIFT[0])


def test_the_validation_data_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path, max_epochs=1, valid_data=moving)
    monkeypatch.setitem(SHIFT, 0, 0.5)
    with pytest.raises(DataError, match=r"valid_data\[0\] was"):
        trained(tmp_path, max_epochs=2, valid_data=moving)
    monkeypatch.setitem(SHIFT, 0, 0.0)
    assert trained(tmp_path, max_epochs=2, valid_data=moving)["step"] == 8


def test_a_checkpoint_without_hashes_resumes(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    restore(run, console())
    position = run.position()
    position.pop("samples")
    other = small_run(tmp_path, train_data=lambda: shifted(0.5))
    compare_samples(other, position, same_kernels=True, console=console())


def test_on_other_kernels_a_difference_is_a_warning(tmp_path: Path) -> None:
    to, saved = console(), {"samples": {"train_data[0]": "0" * 16, "a name of tomorrow": "1" * 16}}
    compare_samples(small_run(tmp_path), saved, same_kernels=False, console=to)
    assert "WARNING: the data has changed since the run began: train_data[0] was 0000000000000000" in printed(to)
    with pytest.raises(DataError, match="has changed"):
        compare_samples(small_run(tmp_path), saved, same_kernels=True, console=to)


def test_a_bad_sample_is_left_to_its_step(tmp_path: Path) -> None:
    def fail() -> float:
        raise ValueError("bad pixels")

    run = small_run(tmp_path, train_data=lambda: Noise(fail))
    assert restore(run, console()) == 0
    assert run.samples["train_data[0]"] == "raised ValueError"


class OfRank(IterableDataset[Any]):
    """A stream whose samples depend on `number`."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Any]:
        return ((torch.full((3,), float(self.number + i)), torch.ones(1)) for i in range(32))


def refused_by(backend: Backend, folder: Path, kind: str) -> str | None:
    """Assemble and restore with data that differ on the last rank; return the message of the error."""
    is_last = backend.rank == backend.world_size - 1
    changes: dict[str, Any] = {
        "same": {},
        "train_data": {"train_data": lambda: shifted(0.5 * is_last)},
        "valid_data": {"valid_data": lambda: shifted(0.5 * is_last)},
        "length": {"train_data": lambda: points(40 if is_last else 32), "max_epochs": None, "max_steps": 4},
        "entropy": {"train_data": lambda: Noise(random.SystemRandom().random)},
        "stream": {"train_data": lambda: OfRank(int(is_last)), "max_epochs": None, "max_steps": 4},
        "same stream": {"train_data": lambda: OfRank(7), "max_epochs": None, "max_steps": 4},
    }[kind]
    config = small_config(num_slots=4, **changes)
    run: Run = assemble(config, backend, RunDirectory(folder / kind), {})
    try:
        restore(run, console())
    except DataError as error:
        assert backend.rank == 0
        return str(error)
    except RemoteError as error:
        return error.message.removeprefix("DataError: ")
    finally:
        run.close()
    return None


EXPECTED = {
    "same": None,
    "same stream": None,
    "train_data": "the ranks have different data: train_data[0] is ",
    "valid_data": "the ranks have different data: valid_data[0] is ",
    "length": "the ranks have different training data: rank 0 has {'dataset_length': 32",
    "entropy": "train_data[31] is another sample when it is loaded again (rank 0)",
    "stream": "the ranks have different data: the stream's sample 0 is ",
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_ranks_with_other_data_stop_with_one_error(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    first, *others = ranks(3 if kind == "train_data" else 2, refused_by, tmp_path, kind)
    assert others == [first] * len(others)
    expected = EXPECTED[kind]
    assert first is None if expected is None else first.startswith(expected), first
