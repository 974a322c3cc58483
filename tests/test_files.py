"""Files that a crash never leaves half-written, strict JSON, and one line a step whatever was killed in between."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.files import MAX_JSON_BYTES, JsonLines, json_text, read_json, write_text

ROOT = Path(__file__).parents[1]

# Replaces a file again and again; the two texts have different lengths.
REWRITER = """
import sys
from pathlib import Path
sys.modules["torch"] = None  # this module must not need it
from disttrain.files import write_text
path = Path(sys.argv[1])
write_text(path, "a" * 100_000)
print("ready", flush=True)
while True:
    for text in ("b" * 200_000, "a" * 100_000):
        write_text(path, text)
"""


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path: Path, at: int, *new: int) -> None:
    """Open the file as a run that resumes at step `at`, and write a line for each new step."""
    lines = JsonLines(path, at)
    for step in new:
        lines.write({"step": step, "from": at})
    lines.close()


def test_a_killed_writer_leaves_the_old_text_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with subprocess.Popen([sys.executable, "-c", REWRITER, str(path)], stdout=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        read = {path.read_text() for _ in range(50)}
        os.kill(writer.pid, signal.SIGKILL)
    assert {*read, path.read_text()} <= {"a" * 100_000, "b" * 200_000}


def test_a_text_replaces_the_one_before_and_leaves_no_other_file(tmp_path: Path) -> None:
    for text in ("first", "ü", ""):
        write_text(tmp_path / "name.json", text)
        assert (tmp_path / "name.json").read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["name.json"]


def test_json_has_null_for_numbers_that_are_not_finite() -> None:
    value = {"a": [1, 0.5, math.nan, (math.inf, True)], "b": {"c": -math.inf}, "d": "nan"}
    assert json_text(value) == '{"a": [1, 0.5, null, [null, true]], "b": {"c": null}, "d": "nan"}'


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner), max_leaves=9
)


def without_infinities(value: Any) -> Any:
    """Return a value as a strict reader of JSON gets it."""
    if isinstance(value, list):
        return [without_infinities(part) for part in value]
    if isinstance(value, dict):
        return {name: without_infinities(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def refuse(name: str) -> None:
    raise AssertionError(f"got {name}, which is not JSON")


@settings(max_examples=30)
@given(values, st.sampled_from([None, 2]))
def test_json_is_strict_and_comes_back_the_same(value: Any, indent: int | None) -> None:
    assert json.loads(json_text(value, indent), parse_constant=refuse) == without_infinities(value)


def test_a_resumed_run_writes_again_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write(path, 0, 1, 2, 3, 4, 5)
    write(path, 3, 4, 5, 6)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": s, "from": 0} for s in (1, 2, 3)] + [{"step": s, "from": 3} for s in (4, 5, 6)]


def test_a_step_gets_no_second_line(tmp_path: Path) -> None:
    path = tmp_path / "valid.jsonl"
    write(path, 0, 5, 5)
    write(path, 5, 5, 10)
    assert steps(path) == [5, 10]


@pytest.mark.parametrize("end", [b'{"step": 3, "fr', b'{"ste', b"\0\0\0", b"\xff\xfe", b"3"])
def test_a_line_that_was_cut_short_is_removed(tmp_path: Path, end: bytes) -> None:
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


def test_other_processes_see_a_line_as_soon_as_it_is_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "train.jsonl", 0)
    lines.write({"step": 1}, {"step": 2})
    assert steps(tmp_path / "train.jsonl") == [1, 2]
    lines.sync()
    lines.close()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"step": 1e999}', "1e999 is too large a number"),
        (b"[Infinity]", "Infinity is not a JSON number"),
        (b'{"a":' * 60 + b"1" + b"}" * 60, "lie too deep in each other"),
        (b"[" * 100_000, "lie too deep in each other"),
        (b"1" * 5000, "Exceeds the limit"),
        (b"\xff", "codec can't decode"),
        (b" " * (MAX_JSON_BYTES + 1), "larger than"),
    ],
)
def test_a_damaged_small_file_is_one_value_error(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_json(tmp_path / "a.json")


def test_a_small_file_is_read_back(tmp_path: Path) -> None:
    value = {"a": [1, -0.5, None, True, {"b": "\u00fc"}]}
    write_text(tmp_path / "a.json", json_text(value))
    assert read_json(tmp_path / "a.json") == value
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize(
    "damage", ['{"step": "9"}', '{"step": null}', '{"step": [1]}', "[" * 100_000, "7", '{"step": true}']
)
def test_a_line_that_no_run_wrote_ends_what_is_kept(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "lines.jsonl", 0, 1, 2)
    with (tmp_path / "lines.jsonl").open("a") as file:
        file.write(damage + "\n")
    write(tmp_path / "lines.jsonl", 5, 6)
    assert steps(tmp_path / "lines.jsonl") == [1, 2, 6]


SENDS = """
import multiprocessing, os, sys, tempfile
import torch
from disttrain.files import keep_socket_paths_short

def send(queue, received):
    queue.put(torch.arange(3))  # torch passes its memory on through a socket of multiprocessing
    received.wait(60)

if __name__ == "__main__":
    if sys.argv[1] == "short":
        keep_socket_paths_short()
    assert tempfile.gettempdir() == os.environ["TMPDIR"]
    context = multiprocessing.get_context("forkserver")
    queue, received = context.Queue(), context.Event()
    process = context.Process(target=send, args=(queue, received))
    process.start()
    assert queue.get(timeout=60).tolist() == [0, 1, 2]
    received.set()
    process.join()
"""


@pytest.mark.parametrize("how", ["short", "as it is"])
def test_processes_find_each_other_under_a_long_tmpdir(how: str, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100) / ("y" * 40)
    folder.mkdir(parents=True)
    (tmp_path / "sends.py").write_text(SENDS)
    done = subprocess.run(
        [sys.executable, tmp_path / "sends.py", how],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if how == "short":
        assert done.returncode == 0, done.stderr
    elif done.returncode:  # newer Pythons do by themselves what is tested here
        assert "AF_UNIX path too long" in done.stderr
