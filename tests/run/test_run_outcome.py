"""The content of result.json: the same weights on all ranks, and the best evaluation that is saved."""

from pathlib import Path

import pytest
from small_run import small_run

from disttrain.errors import DisttrainError
from disttrain.handlers.step_end import StepEnd
from disttrain.run.outcome import best_entry, outcome
from disttrain.run.rollback import Attempts


def test_ranks_with_different_weights_are_an_error(tmp_path: Path) -> None:
    run = small_run(tmp_path)

    class Differing:
        """A backend whose other rank has other weights."""

        world_size = 2

        def all_gather(self, digest: str) -> list[str]:
            return [digest, "0" * 64]

    run.backend = Differing()  # type: ignore[assignment]
    end = StepEnd.__new__(StepEnd)
    with pytest.raises(DisttrainError, match=r"the ranks ended with different weights \(rank 0: \w{12}, rank 1: 0{12}"):
        outcome(run, end, Attempts())


def test_a_best_evaluation_that_is_not_saved_is_not_in_the_result(tmp_path: Path) -> None:
    run = small_run(tmp_path, checkpoint={"monitor": "loss"})
    assert run.best is not None
    assert best_entry(run, 8) == {}
    run.best.improved(8, {"loss": 0.5})
    assert best_entry(run, 4) == {}
    assert best_entry(run, 8)["best"] == {
        "step": 8,
        "monitor": "loss",
        "value": 0.5,
        "checkpoint": "step-00000008",
    }
    assert best_entry(small_run(tmp_path), 8) == {}
