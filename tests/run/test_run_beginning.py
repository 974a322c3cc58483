"""Only a run that begins anew takes the weights of `init_from`; its files say which."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import console, net, printed, single, small_config, trained

from disttrain.checkpoint import load
from disttrain.engine import Engine, Events
from disttrain.errors import ConfigError
from disttrain.run.beginning import initial_weights
from disttrain.run.directory import RunDirectory
from disttrain.run.state import Run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    trained(tmp_path / "source", max_epochs=2, seed=9)
    return tmp_path / "source" / "small"


def test_a_resumed_run_takes_nothing_and_needs_no_source(tmp_path: Path, source: Path) -> None:
    changes: dict[str, Any] = {"init_from": f"{source}@4", "ledger": {"every_steps": 1}}
    whole = trained(tmp_path / "whole", max_epochs=2, **changes)
    first, second = console(), console()
    trained(tmp_path / "parts", first, max_epochs=1, **changes)
    shutil.rmtree(source)
    parts = trained(tmp_path / "parts", second, max_epochs=2, **changes)
    assert f"begins with {source}@4, step 4: 9 tensors taken" in printed(first)
    assert "begins with" not in printed(second)
    assert "WARNING" not in printed(second)
    ledgers = [(tmp_path / name / "small" / "ledger.jsonl").read_text() for name in ("whole", "parts")]
    assert ledgers[0] == ledgers[1]
    assert parts["params_sha256"] == whole["params_sha256"]


def test_a_fresh_run_does_not_begin_with_the_run_whose_place_it_takes(tmp_path: Path, source: Path) -> None:
    for path in (source, source / "checkpoints"):
        with pytest.raises(ConfigError, match=r"expected another run than .*, which --fresh sets aside"):
            initial_weights(small_config(init_from=path), RunDirectory(source), single(), fresh=True)
    assert initial_weights(small_config(init_from=source), RunDirectory(tmp_path / "b"), single(), fresh=True)


def test_the_files_of_a_run_say_what_it_took(tmp_path: Path, source: Path) -> None:
    result = trained(tmp_path, max_epochs=1, init_from={"path": source, "skip": "2."})
    run = tmp_path / "small"
    kept = {"path": str(source), "step": 8, "sha256": result["init_from"]["sha256"]}
    assert result["init_from"] == kept
    assert load(run / "checkpoints" / "step-00000004").manifest.position["init_from"] == kept
    record = json.loads((run / "init_from.json").read_text())
    assert {name: record[name] for name in kept} == kept
    assert record["skipped"] == ["2.weight", "2.bias"]
    assert trained(tmp_path, max_epochs=2)["init_from"] == kept


def test_a_run_without_it_has_nothing_of_it_in_its_files(tmp_path: Path) -> None:
    assert "init_from" not in trained(tmp_path, max_epochs=1)
    assert "init_from" not in load(tmp_path / "small" / "checkpoints" / "step-00000004").manifest.position
    assert not (tmp_path / "small" / "init_from.json").exists()


def test_other_weights_for_a_resumed_run_are_not_taken_and_it_says_so(tmp_path: Path, source: Path) -> None:
    trained(tmp_path, max_epochs=1, init_from=source)
    to = console()
    trained(tmp_path, to, max_epochs=2, init_from=f"{source}@4")
    assert f"WARNING: init_from={source}@4 is not taken: the run began with {source}, and" in printed(to)
    trained(tmp_path / "plain", max_epochs=1)
    to = console()
    trained(tmp_path / "plain", to, max_epochs=2, init_from=source)
    assert "is not taken: the run began with the weights of its model, and goes on" in printed(to)


def dies(trainer: Engine, run: Run) -> None:
    def die() -> None:
        raise InterruptedError

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), die)


def test_killed_before_its_first_checkpoint_it_begins_with_the_same_weights(tmp_path: Path, source: Path) -> None:
    whole = trained(tmp_path / "whole", max_epochs=1, init_from=source)
    with pytest.raises(InterruptedError):
        trained(tmp_path, max_epochs=1, init_from=source, handlers=[dies])
    trained(tmp_path / "source", max_epochs=3, seed=9)  # the source was under way, and has newer weights now
    assert trained(tmp_path, max_epochs=1, init_from=source)["params_sha256"] == whole["params_sha256"]
    again = trained(tmp_path, max_epochs=1, init_from=source, fresh=True)
    assert again["init_from"]["step"] == 12


def test_a_launch_that_saved_nothing_leaves_no_trace_in_a_run_without_weights(tmp_path: Path, source: Path) -> None:
    with pytest.raises(InterruptedError):
        trained(tmp_path, max_epochs=1, init_from=source, handlers=[dies])
    assert (tmp_path / "small" / "init_from.json").exists()
    trained(tmp_path, max_epochs=1)
    assert not (tmp_path / "small" / "init_from.json").exists()


def test_handlers_see_the_weights(tmp_path: Path) -> None:
    torch.save({name: torch.ones_like(value) for name, value in net().state_dict().items()}, tmp_path / "ones.pt")
    seen = []

    def copies(trainer: Engine, run: Run) -> None:
        seen.append(run.model[0].weight.detach().clone())  # type: ignore[index]

    trained(tmp_path, max_epochs=1, init_from=tmp_path / "ones.pt", handlers=[copies])
    assert torch.equal(seen[0], torch.ones(4, 3))


def test_a_rollback_to_the_start_begins_with_them_again_and_says_it_once(tmp_path: Path, source: Path) -> None:
    def spoils(trainer: Engine, run: Run) -> None:
        def spoil() -> None:
            if 2 not in run.left_out:
                with torch.no_grad():
                    run.model[0].weight.fill_(float("nan"))  # type: ignore[index]

        trainer.add_event_handler(Events.ITERATION_STARTED(once=2), spoil)

    to = console()
    result = trained(tmp_path, to, max_epochs=1, init_from=source, handlers=[spoils], on_nan="rollback")
    assert result["rollbacks"] == 1
    assert printed(to).count("begins with") == 1
