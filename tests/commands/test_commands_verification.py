"""The runs of a verification: what its ranks printed, and the settings that every run gets."""

from pathlib import Path
from typing import Any

import pytest

from disttrain.commands.verification import NUM_QUOTED_LINES, from_any_folder, quoted_output
from disttrain.config import Config


def test_the_output_of_the_first_rank_with_an_error_is_quoted(tmp_path: Path) -> None:
    logs = [tmp_path / f"rank-{rank}.txt" for rank in range(3)]
    assert quoted_output(logs) == ""
    logs[0].write_text("rank 0 is fine\n")
    assert quoted_output(logs) == "  rank 0 is fine"
    logs[2].write_text("".join(f"line {number}\n" for number in range(99)) + "ValueError: no\n")
    quoted = quoted_output(logs).splitlines()
    assert len(quoted) == NUM_QUOTED_LINES
    assert quoted[-2:] == ["  line 98", "  ValueError: no"]


def test_the_weights_to_begin_with_are_found_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words(path: str | None) -> list[str]:
        given: Any = lambda *_: None  # noqa: E731
        parts: dict[str, Any] = {"model": lambda: None, "train_data": lambda: None, "loss": given, "optimizer": given}
        return from_any_folder(Config(**parts, global_batch_size=1, max_steps=1, init_from=path))

    monkeypatch.chdir(tmp_path)
    assert words(None) == []
    assert words("s3://bucket/a@best") == []
    assert words("runs/a@best") == [f"init_from.path={tmp_path}/runs/a@best"]
