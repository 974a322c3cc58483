"""The curves are read beside a ledger's lines, and rounding is told from a difference."""

import json
import math
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from disttrain.evidence import with_evaluations, with_values, without_rounding

LEDGER: dict[int, dict[str, Any]] = {step: {"step": step, "epoch": 1} for step in range(4)}


def test_each_step_gets_its_evaluation_up_to_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "valid.jsonl"
    assert with_evaluations(LEDGER, path) == LEDGER
    for rest in ('{"step": 2, "lo', "[2]\n", '{"epoch": 1}\n'):
        lines = [{"step": 1, "epoch": 1, "loss": 0.5, "rate": None}, {"step": 9, "epoch": 3, "loss": 0.25}]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)
        expected = {**LEDGER, 1: {**LEDGER[1], "evaluation": {"loss": 0.5, "rate": None}}}
        assert with_evaluations(LEDGER, path) == expected
    assert "evaluation" not in LEDGER[1]


def test_each_step_gets_what_its_curve_holds_beside_the_loss(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    common = {"epoch": 1, "loss": 0.5, "grad_norm": 1.0, "learning_rate": 0.1}
    lines = [{"step": 1, **common}, {"step": 2, **common, "ce": 0.25, "accuracy": None, "left_out": "bad"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "ce": 1')
    assert with_values(LEDGER, path) == {**LEDGER, 2: {**LEDGER[2], "values": {"ce": 0.25, "accuracy": None}}}


@given(st.floats(-1e9, 1e9), st.sampled_from([0.0, 1e-9, 1e-3, 2.0]))
def test_only_last_digits_are_rounding(value: float, relative: float) -> None:
    shapes: list[Any] = [value, [1, value], {"a": value, "b": [value]}]
    other = value * (1 + relative) + math.copysign(relative, value)
    for shape, changed in zip(shapes, [other, [1, other], {"a": other, "b": [value]}], strict=True):
        left, right = ({1: {"evaluation": {"loss": 1.0, "x": each}}} for each in (shape, changed))
        lines, found = without_rounding(left, right, ["x"])
        is_rounding = relative <= 1e-9
        assert lines == (left if is_rounding else right)
        assert bool(found) == (is_rounding and shape != changed)


def test_a_count_or_another_shape_is_no_rounding() -> None:
    for mine, theirs in ((10**9, 10**9 + 1), ([1.0], [1.0, 1.0]), ({"a": 1.0}, {"b": 1.0}), (None, 1.0), (1.0, None)):
        left, right = {1: {"evaluation": {"x": mine}}}, {1: {"evaluation": {"x": theirs}}}
        assert without_rounding(left, right, ["x"]) == (right, [])
    loss: dict[int, dict[str, Any]] = {1: {"evaluation": {"loss": math.nextafter(1.0, 2.0)}}}
    assert without_rounding({1: {"evaluation": {"loss": 1.0}}}, loss, ["x"]) == (loss, [])


def test_only_metrics_may_be_rounded_and_not_the_values_of_a_forward() -> None:
    left, right = (
        {1: {"evaluation": {"ce": value, "clean/ce": value, "clean/x": value}}}
        for value in (0.1, math.nextafter(0.1, 1.0))
    )
    lines, found = without_rounding(left, right, ["x"])
    assert lines == {1: {"evaluation": {**right[1]["evaluation"], "clean/x": 0.1}}}
    assert [text.partition(" ")[0] for text in found] == ["clean/x"]
