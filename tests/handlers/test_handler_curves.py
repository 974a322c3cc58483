"""The curves on disk: strict JSON, and in TensorBoard the values of the resumed run."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from disttrain.handlers.curves import Curves
from disttrain.handlers.losses import Pace


def strict(path: Path) -> list[dict[str, Any]]:
    """Read the file as a reader of strict JSON does, which has no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{path} holds {name}, which is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_curves_are_strict_json(tmp_path: Path) -> None:
    curves = Curves(tmp_path, 0, tensorboard=False)
    curves.trained([{"step": 1, "epoch": 1, "loss": None}], Pace(1, 1, math.nan, 0.1, 100.0))
    curves.validated(1, 1, {"loss": math.nan, "per_class": [0.5, math.inf], "parts": {"a": -math.inf}, "count": 3})
    curves.close()
    assert strict(tmp_path / "train.jsonl") == [{"step": 1, "epoch": 1, "loss": None}]
    assert strict(tmp_path / "valid.jsonl") == [
        {"step": 1, "epoch": 1, "loss": None, "per_class": [0.5, None], "parts": {"a": None}, "count": 3}
    ]
    assert not (tmp_path / "tensorboard").exists()


def test_the_newest_line_is_known_after_a_resume(tmp_path: Path) -> None:
    curves = Curves(tmp_path, 0, tensorboard=False)
    assert curves.newest() == {}
    lines = [{"step": step, "epoch": 1, "loss": step / 4, "ce": step / 8} for step in (1, 2, 3)]
    curves.trained(lines, Pace(3, 1, 0.75, 0.1, 100.0))
    assert curves.newest() == {"loss": 0.75, "ce": 0.375}
    curves.close()
    resumed = Curves(tmp_path, 2, tensorboard=False)
    assert resumed.newest() == {"loss": 0.5, "ce": 0.25}
    resumed.close()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_the_steps_of_the_resumed_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for at, new in ((0, (1, 2, 3)), (2, (3, 4))):
        curves = Curves(tmp_path, at, tensorboard=True)
        for step in new:
            pace = Pace(step, 1, step + at / 10, 0.1, 100.0, {"ce": step / 2, "none": None, "per_class": [0.5]}, 4.0)
            curves.trained([{"step": step}], pace)
            curves.validated(step, 1, {"accuracy": 0.5, "per_class": [0.5, 0.5]})
        curves.close()
    written = scalars(tmp_path / "tensorboard", "train/loss")
    assert [step for step, _ in written] == [1, 2, 3, 4]
    assert [value for _, value in written] == pytest.approx([1.0, 2.0, 3.2, 4.2])
    assert [step for step, _ in scalars(tmp_path / "tensorboard", "valid/accuracy")] == [1, 2, 3, 4]
    assert scalars(tmp_path / "tensorboard", "train/grad_norm") == [(step, 4.0) for step in (1, 2, 3, 4)]
    assert scalars(tmp_path / "tensorboard", "train/ce") == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_a_removed_folder_ends_the_curves_for_tensorboard_without_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "metrics").mkdir()
    curves = Curves(tmp_path / "metrics", 0, tensorboard=True)
    curves.trained([{"step": 1}], Pace(1, 1, 0.5, 0.1, 100.0))
    shutil.rmtree(tmp_path / "metrics")
    curves.trained([{"step": 2}], Pace(2, 1, 0.5, 0.1, 100.0))
    curves.close()
    assert "TensorBoard" in caplog.text
    assert not (tmp_path / "metrics").exists()
