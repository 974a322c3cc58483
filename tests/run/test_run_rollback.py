"""A rollback records the bad step; after too many rollbacks to one checkpoint, the run stops."""

from pathlib import Path

import pytest
from small_run import console, printed, small_run

from disttrain.errors import NonFiniteError
from disttrain.run.rollback import MAX_ROLLBACKS, Attempts, go_back


def bad(step: int) -> NonFiniteError:
    return NonFiniteError(f"the loss became nan at step {step}", step, "the loss became nan")


def test_a_bad_step_is_left_out_from_then_on(tmp_path: Path) -> None:
    left_out: dict[int, str] = {}
    run, to = small_run(tmp_path, left_out), console()
    go_back(run, bad(5), 4, to)
    assert left_out == run.left_out == {5: "the loss became nan"}
    assert run.updates.leaves_out(5)
    assert "going back to the checkpoint of step 4" in printed(to)
    go_back(run, bad(2), 0, to)
    assert "going back to the start of the run" in printed(to)


def test_after_too_many_rollbacks_to_one_checkpoint_the_run_stops(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    for step in range(1, MAX_ROLLBACKS + 1):
        go_back(run, bad(step), 0, console())
    go_back(run, bad(50), 40, console())  # steps before the checkpoint no longer count
    with pytest.raises(NonFiniteError, match=f"went back to the start of the run {MAX_ROLLBACKS} times"):
        go_back(run, bad(MAX_ROLLBACKS + 1), 0, console())


def test_the_clock_of_a_launch_starts_once() -> None:
    attempts = Attempts()
    assert attempts.wall_s == 0.0
    attempts.begin(4)
    began = attempts.began
    attempts.begin(9)
    assert (attempts.first_step, attempts.began) == (4, began)
    assert attempts.wall_s > 0.0
