"""The commands and the code of docs/checkpoints.md have the effects that the page describes."""

import json
import os
import re
import runpy
import shlex
from pathlib import Path

import torch
from commands import ROOT, launch
from ranks import Ranks
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from disttrain.backend import Backend
from disttrain.checkpoint import committed, load_newest, save
from disttrain.commands.main import main

PAGE = (ROOT / "docs" / "checkpoints.md").read_text()


def test_its_commands_train_and_save_in_the_places_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = re.findall(r"(?ms)^```bash run\n(.*?)^```$", PAGE)
    assert len(commands) == 3
    for number, command in enumerate(commands):
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "disttrain.launch"]
        done = launch(*words[3:], "max_epochs=1", "--runs", f"runs-{number}", cwd=tmp_path)
        assert done.code == 0, done.text
    best = json.loads((tmp_path / "runs-0" / "digits" / "result.json").read_text())["best"]
    assert (best["monitor"], best["checkpoint"]) == ("accuracy", "step-00000014")
    assert len(committed(tmp_path / "runs-1" / "digits" / "checkpoints")) == 1
    assert len(committed(tmp_path / "kept" / "digits")) == 1
    assert (tmp_path / "runs-2" / "digits" / "checkpoints" / "elsewhere.txt").read_text() == f"{tmp_path}/kept/digits\n"
    for word in re.findall(r"`disttrain checkpoint (\w+) RUN", PAGE):
        more = [str(tmp_path / "model.safetensors")] if word == "export" else []
        assert main(["checkpoint", word, str(tmp_path / "kept" / "digits"), *more]) == 0
    assert (tmp_path / "model.safetensors").exists()
    check_exports(tmp_path / "runs-0" / "digits", tmp_path)


def check_exports(run: Path, folder: Path) -> None:
    """Do the exports of the page with a run, in a folder."""
    [lines] = re.findall(r"(?ms)^```bash export\n(.*?)^```$", PAGE)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for line in lines.splitlines():
            words = shlex.split(line)
            assert words[:3] == ["disttrain", "export", "runs/digits"]
            assert main(["export", str(run), *words[3:]]) == 0
    finally:
        os.chdir(before)
    step = json.loads((run / "result.json").read_text())["best"]["step"]
    assert (
        torch.load(folder / f"digits-{step}.pt", weights_only=True).keys()
        == load_file(folder / "digits.safetensors").keys()
    )


def test_its_code_saves_and_loads(tmp_path: Path) -> None:
    [code] = re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE)
    model = torch.nn.Linear(2, 3)
    names = {"model": model, "step": 5, "backend": None}
    (tmp_path / "page.py").write_text(code.replace('"checkpoints"', repr(str(tmp_path / "c"))))
    runpy.run_path(str(tmp_path / "page.py"), names)
    assert committed(tmp_path / "c") == ["step-00000010", "step-00000005"]
    loaded = load_newest(tmp_path / "c")
    assert loaded is not None
    assert torch.equal(loaded.state["model"]["weight"], model.weight)


def load_shards(backend: Backend, root: Path) -> list[int]:
    """Run the page's lines on sharded loading; return the shape of this rank's part."""
    [code] = re.findall(r"(?ms)^```python shards\n(.*?)^```$", PAGE)
    assert backend.process_group is not None
    save(root, 5, {"model": {"0.weight": torch.ones(16, 8)}, "step": torch.tensor(5)}, backend=backend)
    mesh = DeviceMesh.from_group(backend.process_group, "cpu")
    names = {"mesh": mesh, "Shard": Shard, "backend": backend, "load_newest": load_newest}
    exec(code.replace('"checkpoints"', repr(str(root))), names)  # noqa: S102 - the page's own code
    state = names["found"].state  # type: ignore[attr-defined]
    assert state["step"] == 5
    return list(state["model"]["0.weight"].to_local().shape)


def test_each_rank_loads_its_part(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, load_shards, tmp_path) == [[8, 8], [8, 8]]


def test_every_option_of_the_command_that_it_names_exists(capsys) -> None:
    for word, options in re.findall(r"`disttrain checkpoint (\w+) RUN([^`]*)`", PAGE):
        try:
            main(["checkpoint", word, "--help"])
        except SystemExit:
            helped = capsys.readouterr().out
        for option in re.findall(r"--\w+", options):
            assert option in helped
