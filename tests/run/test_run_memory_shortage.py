"""A run that does not fit is refused or warned before its first step, and one that dies of memory tells its table."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from small_run import console, net, printed, small_config, trained
from torch import Tensor, nn

from disttrain.backend import Backend
from disttrain.errors import ConfigError, OutOfMemory
from disttrain.handlers.preemption import Preemption
from disttrain.run import memory_table
from disttrain.run.directory import RunDirectory
from disttrain.run.train import train

pytestmark = pytest.mark.usefixtures("torch_settings")
KNOWN = 4 * 29 * 4 + 40
"""Parameters, gradients, one more of two slots, and momentum; and the buffers, of the small run."""


class Hungry(nn.Module):
    """A layer that asks for more memory than there is."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.empty(2**60, dtype=torch.uint8).sum()


def test_a_run_that_cannot_fit_is_refused_before_its_directory_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_table, "host_bytes", lambda: KNOWN - 1)
    with pytest.raises(ConfigError, match="needs more memory than there is, even without activations") as caught:
        trained(tmp_path, max_epochs=1)
    assert "  states of SGD" in str(caught.value)
    assert "to need less:\n  num_slots=4" in str(caught.value)
    assert not (tmp_path / "small" / "checkpoints").exists()


def test_a_run_that_hardly_fits_is_warned_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to = console()
    monkeypatch.setattr(memory_table, "host_bytes", lambda: KNOWN + 1)
    assert trained(tmp_path, to, max_epochs=1)["status"] == "completed"
    assert "the run hardly fits into the memory" in printed(to)
    to = console()
    monkeypatch.setattr(memory_table, "host_bytes", lambda: 2 * KNOWN)
    trained(tmp_path / "other", to, max_epochs=1)
    assert "memory" not in printed(to)
    monkeypatch.setattr(memory_table, "host_bytes", lambda: None)
    trained(tmp_path / "unknown", to, max_epochs=1)
    assert "memory" not in printed(to)


def test_a_run_that_dies_of_memory_tells_its_table_and_the_line(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory) as caught:
        trained(tmp_path, model=lambda: nn.Sequential(net(), Hungry()), max_epochs=1)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("rank 0 has no memory left: RuntimeError: ")
    assert "test_run_memory_shortage.py" in first
    assert any(line.startswith("  states of SGD ") for line in lines)
    assert "to need less:" in lines


def test_a_model_that_cannot_be_built_says_where(tmp_path: Path) -> None:
    def huge() -> nn.Module:
        return nn.Linear(2**29, 2**29)

    with pytest.raises(OutOfMemory, match="has no memory left while model, optimizer and data are built on the CPU"):
        trained(tmp_path, model=huge, max_epochs=1)


def test_another_error_stays_as_it_is(tmp_path: Path) -> None:
    def wrong() -> nn.Module:
        return nn.Linear(7, 1)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trained(tmp_path, model=wrong, max_epochs=1)


def train_with_less_on_one(backend: Backend, folder: str) -> Any:
    with pytest.MonkeyPatch.context() as patch, Preemption() as preemption:
        if backend.rank == 1:
            patch.setattr(memory_table, "host_bytes", lambda: 10)
        train(small_config(max_epochs=1), backend, RunDirectory(Path(folder) / "small"), console(), preemption)


def test_a_host_with_less_memory_is_one_refusal_for_all_ranks(tmp_path: Path, ranks: Ranks) -> None:
    outcomes = ranks.outcomes(2, train_with_less_on_one, str(tmp_path))
    texts = [str(each.error) for each in outcomes]  # type: ignore[union-attr]
    assert all("needs more memory than there is" in text for text in texts), texts
