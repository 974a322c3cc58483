"""Each kind of difference is found at its first step, named by its first cause, and explained if the cause is known."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.commands.compare import compare_runs
from disttrain.errors import ConfigError
from disttrain.evidence import first_difference
from disttrain.run.directory import RunDirectory

NUM_STEPS = 12
CHAIN = [
    "order",
    "batch",
    "slot loss",
    "loss",
    "grad_norm",
    "learning_rate",
    "model",
    "optimizer",
    "kept",
    "values",
    "evaluation",
]
"""The parts of a step, in the order of cause and effect."""


def ledger(every_steps: int = 1) -> dict[int, dict[str, Any]]:
    state = {"model.a": "1", "model.b": "2", "optimizer.a.exp_avg": "3", "kept.ema.a": "4"}
    lines: dict[int, dict[str, Any]] = {0: {"step": 0, "epoch": 0, "state": dict(state)}}
    for step in range(1, NUM_STEPS + 1):
        lines[step] = {
            "step": step,
            "epoch": 1,
            "order": f"o{step}",
            "loss": (1 / step).hex(),
            "grad_norm": (2 / step).hex(),
            "learning_rate": (0.1).hex(),
        }
        if step % every_steps == 0:
            lines[step]["slots"] = {"batch": ["x", "y"], "loss": [(0.5).hex(), (0.25).hex()]}
            lines[step]["state"] = {name: f"{value}{step}" for name, value in state.items()}
        lines[step]["values"] = {"ce": 2 / step, "accuracy": 0.5}
        lines[step]["evaluation"] = {"loss": 1 / step, "rate": 0.5}
    return lines


def spoil(line: dict[str, Any], part: str) -> None:
    """Change one value in a part of a ledger's line."""
    if part == "batch":
        line["slots"]["batch"][1] = "z"
    elif part == "slot loss":
        line["slots"]["loss"][1] = (0.75).hex()
    elif part == "model":
        line["state"]["model.b"] = "z"
    elif part == "optimizer":
        line["state"]["optimizer.a.exp_avg"] = "z"
    elif part == "kept":
        line["state"]["kept.ema.a"] = "z"
    elif part == "values":
        line["values"]["accuracy"] = 0.75
    elif part == "evaluation":
        line["evaluation"]["rate"] = 0.75
    else:
        line[part] = (9.0).hex()


@given(st.dictionaries(st.sampled_from(CHAIN), st.integers(1, NUM_STEPS), min_size=1))
def test_the_first_cause_of_the_first_step_is_named(spoiled: dict[str, int]) -> None:
    left, right = ledger(), ledger()
    for part, step in spoiled.items():
        spoil(right[step], part)
    for one, other in ((left, right), (right, left)):
        found = first_difference(one, other)
        assert found is not None
        assert found.step == min(spoiled.values())
        first = next(part for part in CHAIN if spoiled.get(part) == found.step)
        assert found.what == first.removeprefix("slot ")
        assert found.state_same_at == found.step - 1
        assert f"first difference at step {found.step}: " in found.headline
        assert "ledger.every_steps=1" not in found.explanation


def test_the_same_ledgers_have_no_difference() -> None:
    assert first_difference(ledger(), ledger()) is None
    assert first_difference(ledger(), ledger(4)) is None


@pytest.mark.parametrize(
    ("part", "headline"),
    [
        ("batch", "the loaded data (slot 1): y and z"),
        ("slot loss", "the loss (slot 1): 0.25 (0x1.0000000000000p-2) and 0.75 (0x1.8000000000000p-1)"),
        ("model", "the weights or buffers after the step (model.b): 25 and z"),
        ("optimizer", "the optimizer's state after the step (optimizer.a.exp_avg): 35 and z"),
        ("kept", "the state of a kept object after the step (kept.ema.a): 45 and z"),
        ("values", "the values beside the loss (accuracy): 0.5 and 0.75"),
        ("evaluation", "the results of the evaluation after the step (rate): 0.5 and 0.75"),
        ("grad_norm", "the gradient's norm: 0.4 (0x1.999999999999ap-2) and 9.0 (0x1.2000000000000p+3)"),
    ],
)
def test_a_headline_names_the_place_and_both_values(part: str, headline: str) -> None:
    right = ledger()
    spoil(right[5], part)
    found = first_difference(ledger(), right)
    assert found is not None
    assert found.headline == f"first difference at step 5: {headline}"


def test_a_value_that_one_line_alone_holds_is_not_compared() -> None:
    """The last step of a run has metrics of the training data that a longer run does not have there."""
    right = ledger()
    del right[NUM_STEPS]["values"]["accuracy"]
    assert first_difference(ledger(), right) is None
    right[NUM_STEPS]["values"]["ce"] = 9.0
    found = first_difference(ledger(), right)
    assert found is not None
    assert (found.what, found.where) == ("values", ("ce",))


def test_a_step_that_only_one_run_left_out_is_named() -> None:
    right = ledger()
    right[5].update(loss=None, grad_norm=None, left_out="the loss became nan")
    right[5]["slots"]["loss"] = []
    found = first_difference(ledger(), right)
    assert found is not None
    assert found.headline == "first difference at step 5: whether the step was left out: no and the loss became nan"
    assert "on_nan=rollback" in found.explanation
    assert first_difference(right, right) is None


def test_a_different_state_at_the_beginning_is_named() -> None:
    right = ledger()
    right[0]["state"]["model.a"] = "z"
    found = first_difference(ledger(), right)
    assert found is not None
    assert (found.step, found.what, found.where) == (0, "began", ("model.a",))
    assert "did not begin with the same state" in found.explanation


def test_with_rare_hashes_the_explanation_gives_the_way_to_find_out_more() -> None:
    left, right = ledger(5), ledger(5)
    spoil(right[8], "loss")
    found = first_difference(left, right)
    assert found is not None
    assert (found.step, found.state_same_at) == (8, 5)
    assert "ledger.every_steps=1" in found.explanation


def directory(
    path: Path, lines: dict[int, dict[str, Any]], *, seed: int = 0, best: int = 0, **result: Any
) -> RunDirectory:
    path.mkdir()
    run = RunDirectory(path)
    fields = {"name": path.name, "seed": seed, "num_workers": seed}
    run.config_json.write_text(json.dumps({"fields": fields, "hash": "", "folder": None}))
    run.ledger_jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    if result:
        run.result_json.write_text(
            json.dumps(
                {**result, "best": {"step": best, "monitor": "loss", "value": 0.5, "checkpoint": "step-00000002"}}
            )
        )
    return run


def test_two_runs_are_compared_as_far_as_both_have_come(tmp_path: Path) -> None:
    short = {step: line for step, line in ledger(5).items() if step <= 7}
    one = directory(tmp_path / "one", ledger(), step=NUM_STEPS, params_sha256="abc")
    other = directory(tmp_path / "other", short)
    other.ledger_jsonl.write_text(other.ledger_jsonl.read_text() + '{"step": 8, "ep')  # killed while it wrote
    found = compare_runs(one, other)
    assert (found.num_steps, found.last_steps, found.num_hashed) == (7, (NUM_STEPS, 7), 2)
    assert found.weights == ("abc", None)
    assert found.same
    assert found.configs == ()


def test_runs_with_the_same_lines_and_other_final_weights_are_not_the_same(tmp_path: Path) -> None:
    runs = [
        directory(tmp_path / name, ledger(), step=12, params_sha256=weights, best=best)
        for name, weights, best in (("one", "a", 3), ("two", "b", 3), ("three", "a", 4))
    ]
    for others in (runs[:2], runs[::2]):
        found = compare_runs(*others)
        assert found.difference is None
        assert not found.same


def test_configs_that_differ_are_named_where_it_matters(tmp_path: Path) -> None:
    found = compare_runs(directory(tmp_path / "a", ledger()), directory(tmp_path / "b", ledger(), seed=5))
    assert found.configs == ("seed: 0 and 5",)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    good = directory(tmp_path / "good", ledger())
    with pytest.raises(ConfigError, match=r"ledger.jsonl, got: No such file"):
        compare_runs(good, RunDirectory(tmp_path / "none"))
    later = directory(tmp_path / "later", {0: ledger()[0]})
    with pytest.raises(ConfigError, match="no step in common"):
        compare_runs(good, later)
