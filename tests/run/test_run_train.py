"""A whole training in this process: its result, its files, and the order of the parts at the end of a step."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from small_run import console, dies_after, printed, small_run, trained

from disttrain.engine import Engine, Events
from disttrain.handlers.preemption import Preemption
from disttrain.run.state import Run
from disttrain.run.train import attach


def test_the_result_describes_the_end_of_the_run(tmp_path: Path) -> None:
    result = trained(tmp_path, max_epochs=2, checkpoint={"monitor": "loss"})
    written = json.loads((tmp_path / "small" / "result.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert (result["status"], result["step"], result["epoch"]) == ("completed", 8, 2)
    assert (result["world_size"], result["num_slots"], result["checkpoint"]) == (1, 2, "step-00000008")
    assert result["best"]["value"] == min(valid_losses(tmp_path))
    assert len((tmp_path / "small" / "metrics" / "train.jsonl").read_text().splitlines()) == 8


def valid_losses(folder: Path) -> list[float]:
    lines = (folder / "small" / "metrics" / "valid.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_parts_act_at_a_steps_end_in_one_order_after_the_configs_handlers(tmp_path: Path) -> None:
    run = small_run(tmp_path, handlers=[lambda trainer, run: None])
    add, order = run.trainer.add_event_handler, list[str]()

    def noted(event: Any, handler: Any, *args: Any, **kwargs: Any) -> Any:
        if event == Events.ITERATION_COMPLETED:
            order.append(type(handler.__self__).__name__)
        return add(event, handler, *args, **kwargs)

    run.trainer.add_event_handler = noted  # type: ignore[method-assign]
    run.directory.open()
    with ExitStack() as stack, Preemption() as preemption:
        attach(run, preemption, console(), 0, stack)
    run.directory.close()
    assert order == ["Watchdog", "ProgressDisplay", "LossLog", "Ledger", "StepEnd"]


def test_a_run_whose_bits_are_not_promised_gives_a_warning(tmp_path: Path) -> None:
    to = console()
    trained(tmp_path, to, max_epochs=1, deterministic=False)
    assert "WARNING: deterministic=false: the same bits are not promised" in printed(to)


def test_an_error_leaves_the_directory_free_for_the_next_launch(tmp_path: Path) -> None:
    def broken(trainer: Engine, run: Run) -> None:
        @trainer.on(Events.ITERATION_COMPLETED(once=3))
        def fail() -> None:
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        trained(tmp_path, handlers=[broken], checkpoint={"every_steps": 2})
    assert trained(tmp_path)["params_sha256"] == trained(tmp_path / "whole")["params_sha256"]


def stop_after_an_epoch(trainer: Engine, run: Run) -> None:
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), trainer.terminate)


def test_a_run_that_its_own_code_ends_is_over_until_another_length_is_asked_for(tmp_path: Path) -> None:
    config = {"handlers": [stop_after_an_epoch], "max_epochs": 3}
    first = trained(tmp_path, **config)
    assert (first["status"], first["step"]) == ("completed", 4)
    assert first["terminated"] == {"max_epochs": 3, "max_steps": None}
    again = trained(tmp_path, **config)  # as if the process had been killed before it wrote its result
    assert (again["step"], again["terminated"]) == (4, first["terminated"])
    assert again["params_sha256"] == first["params_sha256"]
    longer = trained(tmp_path, **config | {"max_epochs": 4})
    assert (longer["step"], longer.get("terminated")) == (16, None)


def test_a_run_that_comes_to_its_end_is_not_marked(tmp_path: Path) -> None:
    assert "terminated" not in trained(tmp_path)


NEVER_IMPROVES: dict[str, Any] = {
    "validate": {"every_steps": 3},
    "checkpoint": {"every_steps": 2},
    "max_epochs": 5,
    "early_stop": {"monitor": "loss", "patience": 2, "min_delta": 100.0},
}
"""20 steps; the evaluation after step 3 is the best, and those after 6 and 9 do not improve."""


def files(folder: Path) -> list[str]:
    return [(folder / "small" / name).read_text() for name in ("ledger.jsonl", "metrics/valid.jsonl")]


def test_a_run_that_no_longer_improves_is_completed_and_says_why(tmp_path: Path) -> None:
    result = trained(tmp_path, **NEVER_IMPROVES)
    best = valid_losses(tmp_path)[0]
    assert (result["status"], result["step"], "terminated" in result) == ("completed", 9, False)
    assert result["stopped"] == (
        f"early: valid/loss has not improved by 100 for 2 evaluations (best {best:.4g} at step 3)"
    )
    assert result["metrics"]["loss"] == valid_losses(tmp_path)[-1]
    assert result["checkpoint"] == "step-00000009"
    again = trained(tmp_path, **NEVER_IMPROVES | {"max_epochs": 50})  # as if killed before it wrote its result
    assert {**again, "wall_s": 0, "samples_per_second": 0} == {**result, "wall_s": 0, "samples_per_second": 0}
    assert len(valid_losses(tmp_path)) == 3


@pytest.mark.parametrize("step", [6, 8])
def test_killed_on_the_way_it_ends_at_the_same_step(tmp_path: Path, step: int) -> None:
    whole = trained(tmp_path / "whole", **NEVER_IMPROVES)
    with pytest.raises(ValueError, match="on purpose"):
        trained(tmp_path / "cut", handlers=[dies_after(step)], **NEVER_IMPROVES)
    result = trained(tmp_path / "cut", **NEVER_IMPROVES)
    for name in ("status", "step", "stopped", "params_sha256", "metrics"):
        assert result[name] == whole[name]
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("early_stop", [{"monitor": None}, {"monitor": "loss", "patience": 4, "min_delta": 100.0}])
def test_with_more_patience_or_none_it_goes_on_to_the_bits_of_a_run_that_had_it_from_the_start(
    tmp_path: Path, early_stop: dict[str, Any]
) -> None:
    whole = trained(tmp_path / "whole", **NEVER_IMPROVES | {"early_stop": early_stop})
    assert whole["step"] == (20 if early_stop["monitor"] is None else 15)
    trained(tmp_path / "cut", **NEVER_IMPROVES)
    result = trained(tmp_path / "cut", **NEVER_IMPROVES | {"early_stop": early_stop})
    assert result["params_sha256"] == whole["params_sha256"]
    assert (result["step"], result.get("stopped")) == (whole["step"], whole.get("stopped"))
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_the_evaluation_after_the_last_step_does_not_count_unless_it_is_due(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", **NEVER_IMPROVES | {"max_epochs": 3})
    trained(tmp_path / "longer", **NEVER_IMPROVES | {"max_epochs": 2})  # evaluated after step 8 too
    result = trained(tmp_path / "longer", **NEVER_IMPROVES | {"max_epochs": 3})
    assert (result["step"], result["stopped"]) == (whole["step"], whole["stopped"]) == (9, whole["stopped"])


def test_a_run_that_its_own_code_ends_in_the_same_step_stays_ended_with_more_patience(tmp_path: Path) -> None:
    def stop(trainer: Engine, run: Run) -> None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=9), trainer.terminate)

    for patience in (2, 9):
        early_stop = {"monitor": "loss", "patience": patience, "min_delta": 100.0}
        result = trained(tmp_path, handlers=[stop], **NEVER_IMPROVES | {"early_stop": early_stop})
        assert (result["step"], "terminated" in result, "stopped" in result) == (9, True, patience == 2)


def test_another_rule_gives_a_warning(tmp_path: Path) -> None:
    trained(tmp_path, **NEVER_IMPROVES)
    to = console()
    trained(tmp_path, to, **NEVER_IMPROVES | {"early_stop": {"monitor": "loss"}})
    assert "WARNING: early_stop counts anew from here: until now it had monitor='loss'" in printed(to)
