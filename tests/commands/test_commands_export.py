"""`disttrain export`: its forms, the names of its files, and the mistakes that it refuses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import ones

from disttrain.checkpoint import CheckpointInfo, save
from disttrain.commands.main import main


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run directory with two checkpoints; the working directory is a folder of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    described = {"": {"architecture": "Net", "config": {"model_type": "net"}}}
    for step in (10, 20):
        state = {"model": {"a": ones(8, 4) * step, "b": ones(4)}}
        save(tmp_path / "digits" / "checkpoints", step, state, info=CheckpointInfo(position={"pretrained": described}))
    return tmp_path / "digits"


def words_of(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    try:
        code = main([*map(str, words)])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, (out + err).strip()


def test_without_a_name_it_is_made_of_the_run_and_the_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, name in (
        ((run,), "digits-20.safetensors"),
        ((run / "checkpoints", "--step", "10", "--format", "torch"), "digits-10.pt"),
        ((run / "checkpoints" / "step-00000010", "--format", "hf"), "digits-10"),
    ):
        code, text = words_of(capsys, "export", *words)
        assert (code, text.partition(":")[0]) == (0, f"wrote {name}")
        assert Path(name).exists()
    assert float(load_file("digits-20.safetensors")["a"][0, 0]) == 20.0
    assert float(load_file("digits-10/model.safetensors")["a"][0, 0]) == 10.0


def test_the_end_of_the_name_says_the_form(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words_of(capsys, "checkpoint", "export", run, "m.bin")[0] == 0  # the long name of the command
    assert torch.load("m.bin", weights_only=True).keys() == {"a", "b"}
    assert words_of(capsys, "export", run, "m.anything")[0] == 0
    assert load_file("m.anything").keys() == {"a", "b"}


def test_a_size_in_words_limits_the_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = words_of(capsys, "export", run, "m.safetensors", "--max-shard-size", "0.05KiB", "--dtype", "bfloat16")
    size = sum(path.stat().st_size for path in Path().glob("*.safetensors"))
    assert (code, text) == (0, f"wrote m.safetensors: 2 tensors of step 20, {size} B in 2 files")
    assert [path.name for path in sorted(Path().iterdir())] == [
        "m-00001-of-00002.safetensors",
        "m-00002-of-00002.safetensors",
        "m.safetensors.index.json",
    ]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--max-shard-size", "5 apples"), "expected a size such as 5GB, 200MB or 4GiB, got 5 apples"),
        (("--max-shard-size", "0GB"), "expected a size such as 5GB"),
        (("--max-shard-size", "5GB", "--format", "torch"), "--max-shard-size: expected --format safetensors or hf"),
        (("--dtype", "int8"), "invalid choice: 'int8'"),
        (("--module", "c"), "the model has no module c with tensors"),
    ],
)
def test_mistakes_are_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], reason: str
) -> None:
    code, text = words_of(capsys, "export", run, *words)
    assert code == 2
    assert reason in text
    assert "Traceback" not in text
    assert list(Path().iterdir()) == []
