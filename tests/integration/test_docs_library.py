"""All code of docs/library.md runs unchanged: its loops with kills, its other pieces one by one."""

import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import ROOT, environment, kill
from lives import Lives

PAGE = (ROOT / "docs" / "library.md").read_text()
EPOCHS, STEPS = 3, 3 * (1797 // 96)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"(?ms)^```{re.escape(kind)}\n(.*?)^```$", PAGE)


def applied(diff: str, text: str) -> str:
    """Return `text` with the hunks of a diff applied; each hunk must fit at exactly one place."""
    for hunk in re.split(r"(?m)^@@.*\n", diff)[1:]:
        lines = [line if line else " " for line in hunk.splitlines()]
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"this hunk fits at {text.count(old)} places:\n{hunk}"
        text = text.replace(old, new)
    return text


PLAIN = blocks("python file=plain.py")[0]
DIFF = blocks("diff from=plain.py to=resumable.py")[0]
RESUMABLE = applied(DIFF, PLAIN)
RANKS = applied(blocks("diff from=resumable.py to=ranks.py")[0], RESUMABLE)


def test_about_ten_lines_make_the_loop_resumable() -> None:
    added = [line for line in DIFF.splitlines() if line.startswith("+") and line[1:].strip()]
    assert 1 <= len(added) <= 12
    assert f"resumable in one process by {len(added)} lines" in PAGE


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    forking = Lives(environment())
    yield forking
    forking.close()


def write(folder: Path, name: str, code: str, workers: int = 0) -> str:
    """Write a script with another number of workers; return its name."""
    assert code.count("WORKERS = 2\n") == 1
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(code.replace("WORKERS = 2\n", f"WORKERS = {workers}\n"))
    return name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def text(folder: Path) -> str:
    return (folder / "out.txt").read_text()


def test_the_plain_loop_learns(lives: Lives, tmp_path: Path) -> None:
    assert lives(write(tmp_path, "plain.py", PLAIN, workers=2), tmp_path) == [0], text(tmp_path)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", text(tmp_path))]
    assert len(losses) == EPOCHS
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def whole(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the weights of the resumable loop, never killed."""
    folder = tmp_path_factory.mktemp("whole")
    assert lives(write(folder, "resumable.py", RESUMABLE), folder) == [0], text(folder)
    return weights(folder)


def test_killed_anywhere_with_any_number_of_workers(lives: Lives, whole: object, tmp_path: Path) -> None:
    chance = random.SystemRandom()
    deaths = [("step", chance.randint(1, 20)), ("fsync", chance.randint(1, 12)), ("step", chance.randint(1, 10))]
    print("killed at", deaths)  # shown when the test fails
    for workers, death in zip((2, 0, 1), deaths, strict=True):
        assert lives(write(tmp_path, "loop.py", RESUMABLE, workers), tmp_path, kill=death) == [-9], text(tmp_path)
        assert not (tmp_path / "model.pt").exists()
    assert lives(write(tmp_path, "loop.py", RESUMABLE, workers=3), tmp_path) == [0], text(tmp_path)
    assert same(weights(tmp_path), whole)


@pytest.fixture(scope="module")
def alone(lives: Lives, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Return the weights of the loop over slots in one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert lives(write(folder, "ranks.py", RANKS), folder) == [0], text(folder)
    return weights(folder)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_gives_the_same_bits(lives: Lives, alone: object, tmp_path: Path, ranks: int) -> None:
    assert lives(write(tmp_path, "ranks.py", RANKS), tmp_path, ranks=ranks) == [0] * ranks, text(tmp_path)
    assert same(weights(tmp_path), alone)


def test_killed_on_three_ranks_and_resumed_on_two(lives: Lives, alone: object, tmp_path: Path) -> None:
    step = random.SystemRandom().randint(11, STEPS - 1)  # after the last one, rank 0 could end before it is killed
    print("killed at", step)
    codes = lives(write(tmp_path, "ranks.py", RANKS, workers=1), tmp_path, ranks=3, kill=("step", step), victim=1)
    assert codes[1] == -9
    assert not (tmp_path / "model.pt").exists()
    assert list((tmp_path / "checkpoints").glob("step-*"))
    assert lives(write(tmp_path, "ranks.py", RANKS), tmp_path, ranks=2) == [0, 0], text(tmp_path)
    assert same(weights(tmp_path), alone)


@pytest.mark.slow
def test_killed_on_eight_ranks_then_three_then_five(lives: Lives, alone: object, tmp_path: Path) -> None:
    chance = random.SystemRandom()
    deaths = [(8, chance.randint(1, 20)), (3, chance.randint(1, 20))]
    print("ranks, killed at", deaths)
    for ranks, step in deaths:
        script, victim = write(tmp_path, "ranks.py", RANKS), chance.randrange(ranks)
        assert -9 in lives(script, tmp_path, ranks=ranks, kill=("step", step), victim=victim)
    assert lives(write(tmp_path, "ranks.py", RANKS, workers=1), tmp_path, ranks=5) == [0] * 5, text(tmp_path)
    assert same(weights(tmp_path), alone)


@pytest.mark.slow
def test_torchrun_starts_it(alone: object, tmp_path: Path) -> None:
    (line,) = blocks("bash")
    assert line == "torchrun --standalone --nproc-per-node 3 ranks.py\n"
    write(tmp_path, "ranks.py", RANKS)
    done = subprocess.run(
        [*TORCHRUN, "2", "ranks.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path), alone)


@pytest.mark.slow
def test_torchrun_killed_from_outside_at_random_moments(alone: object, tmp_path: Path) -> None:
    # Slower steps, so that a random moment falls into the loop.
    code = RANKS.replace(
        "        schedule.step()\n", "        schedule.step()\n        __import__('time').sleep(0.1)\n"
    )
    write(tmp_path, "ranks.py", code, workers=1)
    for ranks in (3, 2):
        process = subprocess.Popen(
            [*TORCHRUN, str(ranks), "ranks.py"], cwd=tmp_path, env=environment(), start_new_session=True, text=True
        )
        time.sleep(random.SystemRandom().uniform(5, 10))
        kill(process)
    done = subprocess.run([*TORCHRUN, "1", "ranks.py"], cwd=tmp_path, env=environment(), check=False)
    assert done.returncode == 0
    assert same(weights(tmp_path), alone)


def test_the_piece_for_your_ddp_loop_gives_the_same_bits(lives: Lives, tmp_path: Path) -> None:
    (code,) = blocks("python ranks")
    by_ranks = []
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        (folder / "ddp.py").write_text(code)
        assert lives("ddp.py", folder, ranks=ranks) == [0] * ranks, text(folder)
        by_ranks.append(weights(folder))
    assert same(by_ranks[0], by_ranks[1])
    assert same(by_ranks[0], by_ranks[2])


@pytest.mark.parametrize("number", range(len(blocks("python run"))))
def test_the_other_pieces_run(lives: Lives, tmp_path: Path, number: int) -> None:
    code = blocks("python run")[number]
    assert "\nassert " in code
    (tmp_path / "piece.py").write_text(code)
    assert lives("piece.py", tmp_path) == [0], text(tmp_path)


def test_every_block_is_run() -> None:
    kinds = re.findall(r"(?m)^```(.+)$", PAGE)
    known = {"python file=plain.py", "diff from=plain.py to=resumable.py", "diff from=resumable.py to=ranks.py"}
    assert set(kinds) - known == {"bash", "python ranks", "python run"}
