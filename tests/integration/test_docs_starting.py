"""The commands and the files of docs/starting.md have the effects that the page describes."""

import re
import shlex
from pathlib import Path

import pytest
from commands import ROOT, launch, lines, result
from safetensors.torch import load_file

from disttrain.checkpoint import load
from disttrain.commands.main import main

PAGE = (ROOT / "docs" / "starting.md").read_text()
COMMANDS = [shlex.split(command)[3:] for command in re.findall(r"(?ms)^```bash run\n(.*?)^```$", PAGE)]

SHORT = ("global_batch_size=16", "num_slots=2", "max_epochs=none", "schedule=none", "ledger.every_steps=1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a working directory with the page's files, in which the first command has run."""
    path = tmp_path_factory.mktemp("page")
    (path / "examples").mkdir()
    for name in ("digits.py", "adapters.py"):
        (path / "examples" / name).write_text((ROOT / "examples" / name).read_text())
    [code] = re.findall(r"(?ms)^```python file=parity.py\n(.*?)^```$", PAGE)
    (path / "examples" / "parity.py").write_text(code)
    assert [words[0] for words in COMMANDS] == ["examples/digits.py", "examples/parity.py", "examples/adapters.py"]
    done = launch(*COMMANDS[0], *SHORT, "max_steps=3", "validate.every_steps=2", cwd=path)
    assert done.code == 0, done.text
    return path


def test_the_best_of_a_run_is_tuned_with_a_new_head(folder: Path) -> None:
    done = launch(*COMMANDS[1], *SHORT, "max_steps=1", cwd=folder)
    assert done.code == 0, done.text
    [line] = [line for line in done.out.splitlines() if line.startswith("begins with")]
    best = result(folder / "runs" / "base")["best"]
    assert line.replace(f"step {best['step']}:", "step 266:") in PAGE
    assert result(folder / "runs" / "parity")["init_from"]["step"] == best["step"]


def test_adapters_are_saved_alone_and_have_the_same_bits_on_two_ranks(folder: Path) -> None:
    for words, ranks in ((("name=whole", "max_steps=4"), 0), (("max_steps=2",), 2), (("max_steps=4",), 0)):
        done = launch(*COMMANDS[2], *SHORT, *words, ranks=ranks, cwd=folder)
        assert done.code == 0, done.text
    assert "resuming from step 2" in done.out
    ledgers = [lines(folder / "runs" / name / "ledger.jsonl") for name in ("whole", "adapters")]
    assert ledgers[0] == ledgers[1]
    run = folder / "runs" / "adapters"
    assert main(["checkpoint", "export", str(run), str(folder / "adapters.safetensors")]) == 0
    trained = {
        name for name in load_file(folder / "adapters.safetensors") if not re.search("running|num_batches", name)
    }
    paths = {f"{index}.{way}.weight" for index in (0, 3, 7) for way in ("down", "up")}
    assert trained == paths | {"11.weight", "11.bias"}
    position = load(run / "checkpoints" / "step-00000004").manifest.position
    base = load(folder / "runs" / "base" / "checkpoints" / f"step-{position['init_from']['step']:08}")  # type: ignore[index, call-overload]
    frozen = {name for name in base.state["model"] if re.fullmatch(r"[01347]\.(weight|bias)", name)}
    assert set(position["frozen_left_out"]) == {f"model.{name}" for name in frozen}  # type: ignore[arg-type]
    assert len(frozen) == 10  # the weights and biases of three convolutions and two BatchNorms
    assert base.manifest.step == result(folder / "runs" / "base")["best"]["step"]
