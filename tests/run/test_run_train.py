"""A whole training in this process: its result, its files, and the order of the parts at the end of a step."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from small_run import console, printed, small_run, trained

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
