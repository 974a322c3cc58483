"""docs/text.md and examples/gpt.py: all that the page tells to type runs, and is killed and resumed elsewhere."""

import contextlib
import importlib.util
import random
import re
import runpy
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from commands import ROOT, Done, launch, lines, result

from disttrain.commands.main import main
from disttrain.data import TokenFiles
from disttrain.evidence import params_sha256

PAGE = (ROOT / "docs" / "text.md").read_text()
FILES = dict(re.findall(r"(?ms)^```python file=(\S+)\n(.*?)^```$", PAGE))
COMMANDS = re.findall(r"(?m)^(?:torchrun|python) .*disttrain.launch (\S+)$", PAGE)
SHORT = ("max_steps=6", "global_batch_size=16", "valid_data=none")
LOSS_OF_A_GUESS = 5.545  # log(256)
slow = pytest.mark.slow
hugging_face = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("datasets", "transformers"))), reason="datasets and transformers are missing"
)

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

# Rank 1 has a Python with another manual.
OTHER_MANUAL = """
import os
from pydoc_data.topics import topics
if os.environ["RANK"] == "1":
    topics["abs"] = topics.get("abs", "") + "!"
from gpt import config
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with examples/gpt.py and the files of the page beside it."""
    shutil.copy(ROOT / "examples" / "gpt.py", tmp_path)
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    return tmp_path


def run(folder: Path, cfg: str, *words: object, ranks: int = 0) -> Done:
    return launch(cfg, *words, ranks=ranks, cwd=folder)


def short(folder: Path) -> tuple[str, ...]:
    """Return the words of a short run over token files in this folder."""
    return (*SHORT, f"train_data.folder={folder / 'tokens'}")


def losses(path: Path) -> list[float]:
    return [line["loss"] for line in lines(path / "metrics/train.jsonl")]


def check_killed_and_resumed(folder: Path, name: str, words: tuple[str, ...]) -> None:
    """Compare a run of the file `name`.py that is killed and resumed on other ranks with an uninterrupted one."""
    step = random.SystemRandom().randint(1, 6)
    print("killed at step", step)  # shown when the test fails
    (folder / "killed.py").write_text(KILLED.replace("MODULE", name).replace("STEP", str(step)))
    done = run(folder, f"{name}.py", "name=whole", *words)
    assert done.code == 0, done.text
    assert run(folder, "killed.py", *words, "checkpoint.every_steps=2", "num_workers=1", ranks=3).code != 0
    assert (folder / "died").exists()
    done = run(folder, "killed.py", *words, "strategy=fsdp", ranks=2)
    assert done.code == 0, done.text
    assert ("resuming from step" in done.out) == (step > 2)
    whole, killed = (folder / "runs" / name for name in ("whole", "killed"))
    assert result(killed)["params_sha256"] == result(whole)["params_sha256"]
    assert (killed / "metrics/train.jsonl").read_bytes() == (whole / "metrics/train.jsonl").read_bytes()


def test_the_gpt_killed_and_resumed_elsewhere_has_the_same_bits(folder: Path) -> None:
    check_killed_and_resumed(folder, "gpt", short(folder))


def test_ranks_with_other_text_stop_with_one_error(folder: Path) -> None:
    (folder / "other.py").write_text(OTHER_MANUAL)
    done = run(folder, "other.py", *short(folder), ranks=2)
    assert done.code != 0
    output = done.rank_output()
    assert "Traceback" not in output
    assert "the ranks have different training data" in output


def test_a_missing_token_file_is_one_line_before_the_first_step(folder: Path) -> None:
    change = 'from gpt import *\nconfig = replace(config, train_data=lambda: TokenFiles("gone.bin", 8, dtype="uint16"))'
    (folder / "gone.py").write_text(f"from disttrain.config import replace\n{change}\n")
    done = run(folder, "gone.py", *SHORT)
    assert done.code == 2
    assert "gone.bin: expected a token file, got nothing" in done.err
    assert "Traceback" not in done.text


def test_the_token_files_of_the_page_are_written_and_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    for name in ("write_tokens.py", "read_tokens.py"):
        runpy.run_path(name)
    num_tokens = (folder / "manual.bin").stat().st_size // 2
    first = "".join(topics[name] for name in sorted(topics)).encode()[:20]
    shown = capsys.readouterr().out
    assert shown == f"{(num_tokens - 1) // 128} windows, the first begins {first}\n"
    assert list(TokenFiles("manual.npy", 128)[-1][0]) == list(TokenFiles("manual.bin", 128, dtype="uint16")[-1][0])


def test_the_page_names_the_commands_that_are_run_here() -> None:
    assert COMMANDS == ["examples/gpt.py", "packed.py", "hugging_face.py"]


def test_the_packed_config_of_the_page_trains(folder: Path) -> None:
    done = run(folder, "packed.py", *short(folder))
    assert done.code == 0, done.text
    first, *_, last = losses(folder / "runs/packed")
    assert first == pytest.approx(LOSS_OF_A_GUESS, rel=0.05)
    assert last < first


@slow
def test_the_packed_config_killed_and_resumed_elsewhere_has_the_same_bits(folder: Path) -> None:
    check_killed_and_resumed(folder, "packed", short(folder))


@slow
def test_the_gpt_learns(folder: Path) -> None:
    tokens = folder / "tokens"
    words = ("max_steps=60", f"train_data.folder={tokens}", f"valid_data.folder={tokens}")
    done = run(folder, "gpt.py", *words, ranks=2)
    assert done.code == 0, done.text
    assert losses(folder / "runs/gpt")[0] == pytest.approx(LOSS_OF_A_GUESS, rel=0.05)
    assert result(folder / "runs/gpt")["metrics"]["loss"] < 3.1  # a table of how often each byte comes has 3.26


@slow
@hugging_face
@pytest.mark.parametrize("name", ["hugging_face", "hugging_face_packed"])
def test_the_configs_with_hugging_face_killed_and_resumed_have_the_same_bits(folder: Path, name: str) -> None:
    check_killed_and_resumed(folder, name, short(folder) if name == "hugging_face_packed" else SHORT)


@slow
@hugging_face
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_model_of_hugging_face_is_exported_loaded_and_trained_on(folder: Path, strategy: str) -> None:
    from transformers import GPT2LMHeadModel

    done = run(folder, "hugging_face.py", *SHORT, f"strategy={strategy}", ranks=2)
    assert done.code == 0, done.text
    (words,) = re.findall(r"(?m)^disttrain (export .*)$", PAGE)
    with contextlib.chdir(folder):
        assert main(words.split()) == 0
        runpy.run_path("generate.py")
        model, report = GPT2LMHeadModel.from_pretrained("manual-gpt2", output_loading_info=True)
    assert not any(report.values()), report
    assert params_sha256(model) == result(folder / "runs/hugging-face")["params_sha256"]
    begun = run(folder, "hugging_face.py", "max_steps=1", *SHORT[1:], "init_from=manual-gpt2", "name=on", ranks=2)
    assert begun.code == 0, begun.text
    assert "begins with manual-gpt2: 28 tensors taken" in begun.out
