"""The table of docs/trainings.md, and runs of its programs that are killed and resumed elsewhere."""

import importlib.util
import os
import random
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from commands import DIGITS, ROOT, Done, launch, result
from program_lines import quoted_files
from ranks import Ranks
from rich.console import Console

from disttrain.backend import Backend
from disttrain.config import load_config, replace
from disttrain.engine import Engine, Events
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.state import Run
from disttrain.run.train import train

PAGE = ROOT / "docs" / "trainings.md"
NEEDS = {"gpt2": "transformers", "hugging_face": "datasets", "hugging_face_stream": "datasets"}
"""The programs that need a library which is no dependency of the tests."""
STEPS = 6
SHORT = ("max_epochs=none", f"max_steps={STEPS}", "checkpoint.every_steps=2", "ledger.every_steps=2")
CHANGES = 'order.changes={3: {"middle": 0.2, "long": 0.8}}'
SMALL = {
    "gpt2": ("global_batch_size=16", "valid_data=none"),
    "gpt": ("global_batch_size=16", "valid_data=none", "train_data.folder=tokens"),
    "mixture": ("global_batch_size=16", "valid_data=none", "train_data.folder=tokens", CHANGES),
    "paragraphs": ("global_batch_size=16", "valid_data=none"),
    "masked": ("global_batch_size=16", "valid_data=none"),
    "images": ("validate.every_steps=2", "early_stop.patience=2"),
}
"""What makes the runs of a program shorter; each has more steps in an epoch than it is given here."""

KILLED = """
import os, pathlib, signal
from MODULE import config as usual
from disttrain import Events
from disttrain.config import replace
def dies(trainer, run):
    mark = pathlib.Path("died")
    @trainer.on(Events.ITERATION_COMPLETED(once=STEP))
    def die():
        if run.backend.rank == run.backend.world_size - 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
config = replace(usual, name="killed", handlers=[dies])
"""


class Row(NamedTuple):
    """A row of the table: its number, the names of our programs and of the peer's, and the lines of both."""

    number: int
    ours: list[str]
    peers: list[str]
    lines: tuple[int, int]


def table() -> list[Row]:
    rows = []
    for line in PAGE.read_text().splitlines():
        if re.match(r"\| \d+ ", line):
            number, _, here, lines, _, its_lines, _ = (cell.strip() for cell in line.split("|")[1:-1])
            ours = re.findall(r"\[(\S+)\]", here)
            peers = ["sweep.py"] if ours[0] == "sweeps.md" else ours
            rows.append(Row(int(number), ours, peers, (int(lines), int(its_lines))))
    return rows


def links() -> dict[str, str]:
    """Return the places to which the names of the table lead, without the section."""
    return dict(re.findall(r"(?m)^\[(\S+)\]: ([^#\s]+)", PAGE.read_text()))


def configs() -> list[str]:
    """Return the modules of the table that are configs."""
    names = dict.fromkeys(name for row in table() for name in row.ours)
    return [name.removesuffix(".py") for name in names if name.endswith(".py") and name not in SCRIPTS]


SCRIPTS = ("own_script.py", "read_digits.py")
"""The programs of the table that are no configs."""


def lacks(name: str) -> str:
    """Return the reason why a program cannot be run here; "" if it can."""
    library = NEEDS.get(name, "torch")
    return "" if importlib.util.find_spec(library) else f"{library} is not installed"


def copy_programs(folder: Path) -> None:
    """Put all examples, and the files that docs pages quote, into a folder."""
    for path in DIGITS.parent.glob("*.py"):
        shutil.copy(path, folder)
    for name, code in quoted_files().items():
        if not (folder / name).exists():
            (folder / name).write_text(code)


def run(folder: Path, cfg: str, *words: str, ranks: int = 0) -> Done:
    return launch(cfg, *words, ranks=ranks, cwd=folder)


def check_killed_and_resumed(folder: Path, module: str) -> None:
    """Compare a run that SIGKILL ends inside an epoch, resumed elsewhere, with an uninterrupted one."""
    step = random.SystemRandom().randint(1, STEPS - 1)
    print("killed at step", step)  # shown when the test fails
    (folder / "killed.py").write_text(KILLED.replace("MODULE", module).replace("STEP", str(step)))
    words = (*SHORT, *SMALL.get(module, ()))
    done = run(folder, f"{module}.py", "name=whole", *words)
    assert done.code == 0, done.text
    assert run(folder, "killed.py", *words, "num_workers=1", ranks=3).code != 0
    assert (folder / "died").exists()
    done = run(folder, "killed.py", *words, "strategy=fsdp", ranks=2)
    assert done.code == 0, done.text
    assert ("resuming from step" in done.out) == (step > 2)
    whole, killed = (folder / "runs" / name for name in ("whole", "killed"))
    assert result(killed)["params_sha256"] == result(whole)["params_sha256"]
    for file in ("metrics/train.jsonl", "metrics/valid.jsonl"):
        assert (killed / file).exists() == (whole / file).exists()
        if (whole / file).exists():
            assert (killed / file).read_bytes() == (whole / file).read_bytes()


class Killed(Exception):
    """Ends a life in a pooled rank as SIGKILL would."""


def life(
    backend: Backend, folder: str, module: str, kill_at: int, words: tuple[str, ...]
) -> tuple[str, list[str]] | None:
    """Train in a pooled rank; return the hash of the weights, the ledger and the curves; None if it was killed."""
    os.chdir(folder)  # the pool goes back
    config = load_config(Path(folder) / f"{module}.py", [*SHORT, *SMALL.get(module, ()), *words])

    def dies(trainer: Engine, run: Run) -> None:
        @trainer.on(Events.ITERATION_COMPLETED(once=kill_at or STEPS + 1))
        def die() -> None:
            assert trainer.state.epoch == 1
            assert trainer.state.epoch_length is None or trainer.state.epoch_length > kill_at
            raise Killed

    config = replace(config, handlers=[*config.handlers, dies]) if kill_at else config
    directory = RunDirectory(Path(folder) / "runs" / config.name)
    try:
        with Preemption(backend, starting=True) as preemption:
            done = train(config, backend, directory, Console(quiet=True), preemption)
    except Killed:
        return None
    files = [directory.ledger_jsonl, *sorted(directory.metrics.glob("*.jsonl"))]
    return done["params_sha256"], [path.read_text() for path in files]


def check_quickly(ranks: Ranks, folder: Path, module: str) -> None:
    """Like `check_killed_and_resumed`, in ranks that stay alive, which takes a third of the time."""
    step = random.SystemRandom().randint(3, STEPS - 1)  # after the first checkpoint
    print("killed at step", step)  # shown when the test fails
    (whole,) = ranks(1, life, str(folder), module, 0, ("name=whole",))
    assert whole is not None
    assert ranks(3, life, str(folder), module, step, ("name=killed", "num_workers=1")) == [None] * 3
    assert (folder / "runs/killed/checkpoints/step-00000002").is_dir()
    assert ranks(2, life, str(folder), module, 0, ("name=killed", "strategy=fsdp")) == [whole] * 2
