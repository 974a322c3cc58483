"""SIGKILL at any moment: an acknowledged checkpoint stays, every checkpoint is whole, none is mixed of two."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from checkpoint_children import fork, wait
from checkpoint_states import mark_of, marked

from disttrain.checkpoint import DiskSaver, clean, load_file, load_newest, save


def newest(root: Path) -> int:
    """Return the step of the newest checkpoint, -1 without one; all checkpoints must be good."""
    loaded = load_newest(root)
    if loaded is None:
        return -1
    assert loaded.skipped == []
    assert mark_of(loaded.state) == loaded.manifest.step
    return loaded.manifest.step


def run_and_kill(root: Path, size: int, num_saves: int, wait_s: float) -> tuple[int, int, int]:
    """Save constantly in a child and kill it some time after `num_saves` saves.

    Return the newest step before, the last acknowledged step, and the number of temporaries that are left.
    """
    reader, writer = os.pipe()

    def body() -> None:
        clean(root)
        step = newest(root)
        os.write(writer, f"{step}\n".encode())
        while True:
            step += 1
            save(root, step, marked(step, size), keep=2)
            os.write(writer, f"{step}\n".encode())

    pid = fork(body)
    os.close(writer)
    with os.fdopen(reader) as lines:
        steps = [int(lines.readline()) for _ in range(1 + num_saves)]
        time.sleep(wait_s)
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL
        steps += map(int, lines)
    left = len([name for name in os.listdir(root) if name.startswith(".")]) if root.exists() else 0
    return steps[0], steps[-1], left


def kill_repeatedly(root: Path, num_kills: int, size: int) -> None:
    moments = random.Random(0)
    after, torn = -1, 0
    for _ in range(num_kills):
        before, acknowledged, left = run_and_kill(root, size, moments.randrange(3), moments.uniform(0, 0.03))
        assert before == after
        after = newest(root)
        assert acknowledged <= after <= acknowledged + 1
        torn += left
    assert torn > 0
    clean(root)
    assert all(name.startswith("step-") for name in os.listdir(root))


def test_ten_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    kill_repeatedly(tmp_path / "c", num_kills=10, size=2**17)


@pytest.mark.slow
def test_two_hundred_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    kill_repeatedly(tmp_path / "c", num_kills=200, size=2**17)


OPERATIONS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def die_before(number: int) -> None:
    """Kill this process right before its `number`-th operation on the file system."""
    count = 0
    for name in OPERATIONS:

        def dying(*args: object, real: object = getattr(os, name), **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)  # type: ignore[operator]

        setattr(os, name, dying)


@pytest.mark.parametrize("case", ["rotate", "replace"])
def test_killed_before_each_operation_of_a_save(tmp_path: Path, case: str) -> None:
    deaths = 0
    for number in range(1, 100):
        root = tmp_path / str(number)
        for old in (1, 2, 3):
            save(root, old, marked(old), keep=3)
        step = 3 if case == "replace" else 4

        def body(root: Path = root, step: int = step, number: int = number) -> None:
            die_before(number)
            # In the case "replace" another state of the same step, with one more value, replaces the old one.
            save(root, step, {**marked(step), "again": True} if case == "replace" else marked(step), keep=2)

        code = wait(fork(body))
        loaded = load_newest(root)
        assert loaded is not None
        assert loaded.skipped == []
        again = loaded.state.pop("again", False)
        assert mark_of(loaded.state) == loaded.manifest.step
        assert loaded.manifest.step in ((3,) if case == "replace" else (3, 4))
        clean(root)
        assert load_newest(root) is not None
        if code == 0:
            assert again == (case == "replace")
            assert loaded.manifest.step == step
            break
        assert code == -signal.SIGKILL
        deaths += 1
    assert deaths >= 8


def test_a_single_file_is_the_old_or_the_new_one_whenever_the_process_dies(tmp_path: Path) -> None:
    for number in range(1, 20):
        saver = DiskSaver(tmp_path, require_empty=False)
        saver(marked(1), "model.pt")

        def body(saver: DiskSaver = saver, number: int = number) -> None:
            die_before(number)
            saver(marked(2), "model.pt")

        code = wait(fork(body))
        assert mark_of(load_file(tmp_path / "model.pt")) in (1, 2)
        if code == 0:
            break
    assert number > 3
    assert mark_of(load_file(tmp_path / "model.pt")) == 2
