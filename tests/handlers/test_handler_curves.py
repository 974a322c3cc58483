"""The curves on disk: one line a step whatever was killed in between, and strict JSON."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from disttrain.handlers.curves import Curves
from disttrain.handlers.losses import Pace
from disttrain.run_directory import JsonLines


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path: Path, at: int, *new: int) -> None:
    lines = JsonLines(path, at)
    for step in new:
        lines.write({"step": step, "from": at})
    lines.close()


def test_a_resumed_run_writes_again_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write(path, 0, 1, 2, 3, 4, 5)
    write(path, 3, 4, 5, 6)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": s, "from": 0} for s in (1, 2, 3)] + [{"step": s, "from": 3} for s in (4, 5, 6)]


def test_a_step_that_has_its_line_is_not_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "valid.jsonl"
    write(path, 0, 5, 5)
    write(path, 5, 5, 10)
    assert steps(path) == [5, 10]


@pytest.mark.parametrize("end", [b'{"step": 3, "fr', b'{"ste', b"\0\0\0", b"\xff\xfe", b"3"])
def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "train.jsonl"
    write(path, 0, 1, 2)
    path.write_bytes(path.read_bytes() + end)
    write(path, 9, 3)
    assert steps(path) == [1, 2, 3]


def test_a_whole_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write(path, 0, 1, 2)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    write(path, 2, 3)
    assert steps(path) == [1, 2, 3]


def test_every_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "train.jsonl", 0)
    lines.write({"step": 1})
    assert steps(tmp_path / "train.jsonl") == [1]
    lines.close()


def strict(path: Path) -> list[dict[str, Any]]:
    """Read as any other program's reader does, which knows no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}, which is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_curves_are_json_that_any_reader_takes(tmp_path: Path) -> None:
    curves = Curves(tmp_path, 0, tensorboard=False)
    curves.trained([{"step": 1, "epoch": 1, "loss": None}], Pace(1, 1, math.nan, 0.1, 100.0))
    curves.validated(1, 1, {"loss": math.nan, "per_class": [0.5, math.inf], "parts": {"a": -math.inf}, "count": 3})
    curves.close()
    assert strict(tmp_path / "train.jsonl") == [{"step": 1, "epoch": 1, "loss": None}]
    assert strict(tmp_path / "valid.jsonl") == [
        {"step": 1, "epoch": 1, "loss": None, "per_class": [0.5, None], "parts": {"a": None}, "count": 3}
    ]
    assert not (tmp_path / "tensorboard").exists()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_what_the_resumed_run_wrote(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for at, new in ((0, (1, 2, 3)), (2, (3, 4))):
        curves = Curves(tmp_path, at, tensorboard=True)
        for step in new:
            curves.trained([{"step": step}], Pace(step, 1, step + at / 10, 0.1, 100.0))
            curves.validated(step, 1, {"accuracy": 0.5, "per_class": [0.5, 0.5]})
        curves.close()
    written = scalars(tmp_path / "tensorboard", "train/loss")
    assert [step for step, _ in written] == [1, 2, 3, 4]
    assert [value for _, value in written] == pytest.approx([1.0, 2.0, 3.2, 4.2])
    assert [step for step, _ in scalars(tmp_path / "tensorboard", "valid/accuracy")] == [1, 2, 3, 4]
