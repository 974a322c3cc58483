"""A config's `weight`: runs whose losses are means over targets, not over slots."""

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from disttrain import Config
from disttrain.backend.base import Backend
from disttrain.data import IndexShuffle
from disttrain.errors import DataError
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.train import train
from disttrain.seeding import manual_seed, seed_for


class Sentences(Dataset[Tensor]):
    """Sentences of 2 to 6 words; from `silent` on they have one word, so no next word to learn."""

    def __init__(self, num: int, silent: int) -> None:
        self.num, self.silent = num, silent

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, i: int) -> Tensor:
        length = 1 if i >= self.silent else 2 + i % 5
        return torch.randint(9, (length,), generator=torch.Generator().manual_seed(i))


class WithABadWord(Sentences):
    """The first word of sentence 5 is 9, which no model knows."""

    def __getitem__(self, i: int) -> Tensor:
        words = super().__getitem__(i)
        return torch.cat([torch.tensor([9]), words[1:]]) if i == 5 else words


def padded(samples: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=-1)


def next_word(model: nn.Module, words: Tensor) -> tuple[Tensor, None]:
    targets = words[:, 1:]
    logits = model(words[:, :-1].clamp(min=0))
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1), None


def infinite_at_a_bad_word(model: nn.Module, words: Tensor) -> tuple[Tensor, None]:
    loss, _ = next_word(model, words.clamp(max=8))
    return loss / (words < 9).all(), None


def targets_of(words: Tensor) -> int:
    return int((words[:, 1:] >= 0).sum())


def config(**changes: Any) -> Config:
    usual: dict[str, Any] = {
        "name": "words",
        "seed": 3,
        "model": lambda: nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 9)).double(),
        "train_data": partial(Sentences, 24, 18),
        "valid_data": partial(Sentences, 10, 7),
        "forward": next_word,
        "collate": padded,
        "weight": targets_of,
        "optimizer": partial(torch.optim.SGD, lr=0.5, momentum=0.9),
        "global_batch_size": 12,
        "num_slots": 12,
        "max_epochs": 3,
    }
    return Config(**(usual | changes))


def lives(backend: Backend, folder: str, changes: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Train in `folder`; return the result and the curves."""
    directory = RunDirectory(Path(folder))
    with Preemption() as preemption:
        result = train(config(**changes), backend, directory, Console(file=io.StringIO()), preemption)
    curves = "".join(path.read_text() for path in sorted(directory.metrics.glob("*.jsonl")))
    return result, curves


def by_hand() -> float:
    """Train and evaluate by whole global batches, one loss over all of their targets; return the validation loss."""
    manual_seed(seed_for(3, "init"))
    model = config().model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    data = Sentences(24, 18)
    for epoch in range(3):
        for batch in torch.tensor(list(IndexShuffle(24, key=seed_for(3, "order", epoch)))).split(12):
            optimizer.zero_grad()
            next_word(model, padded([data[int(i)] for i in batch]))[0].backward()
            optimizer.step()
    return float(next_word(model, padded([Sentences(10, 7)[i] for i in range(10)]))[0].detach())


def test_the_result_is_that_of_a_loop_over_all_targets_whatever_the_slots(ranks: Ranks, tmp_path: Path) -> None:
    losses = []
    for num_slots in (2, 12):  # of 12 slots of one sentence, some have no target at all
        result, curves = ranks(1, lives, str(tmp_path / str(num_slots)), {"num_slots": num_slots})[0]
        assert result["status"] == "completed"
        assert "nan" not in curves.lower()
        losses.append(result["metrics"]["loss"])
    assert losses == [pytest.approx(by_hand(), rel=1e-9)] * 2


def test_ranks_kills_and_fsdp_change_no_bit(ranks: Ranks, tmp_path: Path) -> None:
    def run(world_size: int, name: str, **changes: Any) -> tuple[dict[str, Any], str]:
        first: tuple[dict[str, Any], str] = ranks(world_size, lives, str(tmp_path / name), changes)[0]
        return first

    whole, curves = run(1, "whole")
    for strategy in ("ddp", "fsdp"):
        run(3, strategy, max_epochs=1, strategy=strategy)
        resumed, its_curves = run(2, strategy, strategy=strategy)
        assert resumed["params_sha256"] == whole["params_sha256"]
        assert resumed["metrics"] == whole["metrics"]
        assert its_curves == curves


def test_a_step_without_any_target_is_left_out(ranks: Ranks, tmp_path: Path) -> None:
    changes = {"train_data": partial(Sentences, 12, 0), "max_epochs": 1, "valid_data": None}
    result, curves = ranks(1, lives, str(tmp_path / "silent"), changes)[0]
    assert result["skipped_steps"] == 1
    assert '"loss": null' in curves
    assert "no target of its batch counts" in curves


def test_a_step_that_a_rollback_leaves_out_has_no_weights(ranks: Ranks, tmp_path: Path) -> None:
    changes = {"train_data": partial(WithABadWord, 24, 24), "forward": infinite_at_a_bad_word, "on_nan": "rollback"}
    changes |= {"global_batch_size": 4, "num_slots": 4}  # steps before the bad ones, so that some weights are there
    results = []
    for world_size in (1, 2):
        result, curves = ranks(world_size, lives, str(tmp_path / str(world_size)), changes)[0]
        assert (result["status"], result["rollbacks"]) == ("completed", 3)  # one step in each epoch
        assert curves.count('"loss": null') == 3
        results.append((result["params_sha256"], curves))
    assert results[0] == results[1]


def test_validation_data_without_any_target_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    (outcome,) = ranks.outcomes(1, lives, str(tmp_path / "none"), {"valid_data": partial(Sentences, 4, 0)})
    assert isinstance(outcome.error, DataError)
    assert "expected a target that counts, got weight 0 for every batch" in str(outcome.error)
