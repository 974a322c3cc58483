"""The trainings of docs/trainings.md: each is killed and resumed elsewhere, and the table's numbers are true."""

import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import ROOT, environment, launch, result
from lives import Lives
from program_lines import EXAMPLES, PEERS, RUFF, lines_of, shell_commands
from ranks import Ranks
from trainings import (
    SCRIPTS,
    SHORT,
    Row,
    check_killed_and_resumed,
    check_quickly,
    configs,
    copy_programs,
    lacks,
    links,
    run,
    table,
)

from disttrain.commands.main import main

ROWS = table()
DYING = """
import os, signal
from disttrain import Events
from disttrain.config import replace
def dies(trainer, run):
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=4), lambda: os.kill(os.getpid(), signal.SIGKILL))
config = replace(config, handlers=[dies])
"""
"""What follows a cfg.py that kills itself in its fourth step."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of the digits with a best checkpoint, from which three of the trainings begin."""
    folder = tmp_path_factory.mktemp("base")
    words = ("max_epochs=none", "max_steps=4", "validate.every_steps=2", "checkpoint.monitor=accuracy", "name=base")
    done = launch(EXAMPLES / "digits.py", *words, cwd=folder)
    assert done.code == 0, done.text
    return folder / "runs" / "base"


@pytest.fixture
def folder(tmp_path: Path, base: Path) -> Path:
    """Return a folder with all programs, in which the base has been trained."""
    copy_programs(tmp_path)
    shutil.copytree(base, tmp_path / "runs" / "base")
    return tmp_path


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    forking = Lives(environment())
    yield forking
    forking.close()


@pytest.mark.parametrize("name", configs())
def test_killed_inside_an_epoch_and_resumed_elsewhere_it_has_the_same_bits(
    ranks: Ranks, folder: Path, name: str
) -> None:
    if reason := lacks(name):
        pytest.skip(reason)
    check_quickly(ranks, folder, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", configs())
def test_killed_by_sigkill_inside_an_epoch_and_resumed_elsewhere_it_has_the_same_bits(folder: Path, name: str) -> None:
    if reason := lacks(name):
        pytest.skip(reason)
    check_killed_and_resumed(folder, name)


def test_the_script_killed_on_three_ranks_and_resumed_on_two_has_the_same_bits(lives: Lives, folder: Path) -> None:
    code = (folder / "own_script.py").read_text()
    assert code.count("EPOCHS, WORKERS = 7, 96, 8, 6, 0") == 1
    step = random.SystemRandom().randint(11, 27)
    print("killed at step", step)  # shown when the test fails
    for place, ranks, workers in (("whole", 0, 0), ("killed", 3, 1), ("killed", 2, 0)):
        here = folder / place
        here.mkdir(exist_ok=True)
        shutil.copy(folder / "digits.py", here)
        (here / "own_script.py").write_text(code.replace("8, 6, 0", f"8, 2, {workers}"))
        kill = ("step", step) if ranks == 3 else None
        codes = lives("own_script.py", here, ranks=ranks, kill=kill, victim=1)
        assert codes == [0] * max(ranks, 1) or (kill and codes[1] == -9), (here / "out.txt").read_text()
    whole, killed = (torch.load(folder / place / "model.pt", weights_only=True) for place in ("whole", "killed"))
    assert list(whole) == list(killed)
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    assert "epoch 2" in (folder / "killed" / "out.txt").read_text()


@pytest.mark.slow
def test_the_sweep_killed_in_its_third_run_and_started_again_has_the_same_table(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, line, read = re.fullmatch(
        r"for lr in (.*); do\n  python -m disttrain.launch examples/(.*)\ndone\n(disttrain runs .*)\n",
        shell_commands("sweeps.md"),
    ).groups()  # type: ignore[union-attr]
    (folder / "dying.py").write_text((folder / "digits.py").read_text() + DYING)

    def sweep(into: str, cfg: str, chosen: list[str], ranks: int = 0, *, dies: bool = False) -> None:
        for rate in chosen:
            typed = shlex.split(line.replace("$lr", rate).replace("runs/sweep", into))
            words = [word for word in typed[1:] if not word.startswith("max_epochs")]
            done = run(folder, cfg, *words, "schedule=none", "num_slots=2", *SHORT, ranks=ranks)
            assert (done.code != 0) == dies, done.text

    def shown(into: str) -> str:
        monkeypatch.chdir(folder)
        assert main(shlex.split(read.replace("runs/sweep", into))[1:]) == 0
        return capsys.readouterr().out

    rates = rates.split()
    sweep("runs/whole", "digits.py", rates)
    sweep("runs/again", "digits.py", rates[:2])
    sweep("runs/again", "dying.py", rates[2:3], dies=True)
    sweep("runs/again", "digits.py", rates, ranks=2)
    for rate in rates:
        hashes = [result(folder / into / f"lr-{rate}")["params_sha256"] for into in ("runs/whole", "runs/again")]
        assert hashes[0] == hashes[1]
    assert shown("runs/again") == shown("runs/whole")


def test_exported_weights_read_digits_in_a_plain_script(folder: Path) -> None:
    assert main(["checkpoint", "export", "--best", str(folder / "runs/base"), str(folder / "base.safetensors")]) == 0
    done = subprocess.run(
        [sys.executable, "read_digits.py", "base.safetensors"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        env=environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    best = result(folder / "runs/base")["best"]
    assert done.stdout.startswith(f"{best['value']:.1%} of 360 digits are read right")


def test_the_table_has_the_twelve() -> None:
    assert [row.number for row in ROWS] == [n for n in range(1, 13) if n != 6 or (EXAMPLES / "gan.py").exists()]


def test_every_program_of_the_table_is_where_its_link_leads() -> None:
    places = links()
    assert set(places) == {name for row in ROWS for name in row.ours}
    for name, place in places.items():
        text = (ROOT / "docs" / place).read_text()
        assert Path(place).name == name or f"```python file={name}\n" in text, name


@pytest.mark.skipif(not RUFF.exists(), reason="ruff, which is in disttrain[dev], is not installed")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_the_lines_are_counted_and_no_more_than_the_peers(row: Row) -> None:
    assert row.lines == (lines_of(EXAMPLES, row.ours), lines_of(PEERS, row.peers))
    assert row.lines[0] <= row.lines[1]


def test_every_program_of_a_peer_is_in_the_table() -> None:
    listed = {name for row in ROWS for name in row.peers}
    not_yet = set() if (EXAMPLES / "gan.py").exists() else {"gan.py"}
    assert {path.name for path in PEERS.glob("*.py")} == listed | not_yet | {"digits.py"}  # sweep.py imports digits.py


@pytest.mark.slow
@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_the_peers_programs_run(tmp_path: Path, library: str) -> None:
    pytest.importorskip(library)
    programs = {name: (PEERS / name).read_text() for name in ("digits.py", *(n for row in ROWS for n in row.peers))}
    for name, code in programs.items():
        for field, value in (("max_epochs", 1), ("num_train_epochs", 1), ("max_steps", 4), ("save_steps", 4)):
            code = re.sub(rf"{field}=[0-9]+", f"{field}={value}", code)
        (tmp_path / name).write_text(
            code.replace("TrainingArguments(\n", "TrainingArguments(use_cpu=True, output_dir=")
        )
    for name, code in programs.items():
        if library == ("transformers" if "transformers" in code else "lightning"):
            words = [sys.executable, name, *(["runs/digits/best.ckpt"] if "sys.argv" in code else [])]
            done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"


def test_every_script_of_the_table_is_run_here() -> None:
    assert set(SCRIPTS) <= {name for row in ROWS for name in row.ours}


@pytest.mark.slow
def test_the_commands_of_the_page_run(folder: Path) -> None:
    (folder / "examples").symlink_to(EXAMPLES)
    (commands,) = re.findall(r"(?ms)^```bash run\n(.*?)^```$", (ROOT / "docs/trainings.md").read_text())
    for line in commands.splitlines():
        words = shlex.split(line)
        words[0] = {"python": sys.executable, "torchrun": str(Path(sys.executable).with_name("torchrun"))}[words[0]]
        at_home = environment() | {"HOME": str(folder)}  # where the token files go
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=at_home, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
