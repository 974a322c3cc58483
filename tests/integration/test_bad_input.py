"""Each mistake gives one clear message, a non-zero exit and no traceback, and existing runs stay as they are."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Done, checkpoints, launch, result, write_cfg


def refused(done: Done, *words: str, code: int | None = None) -> None:
    """Check that a command failed with one message that contains all `words`, and without a traceback."""
    assert done.code != 0
    if code is not None:
        assert done.code == code, done.text
    output = done.rank_output()
    assert "Traceback" not in output, output
    for word in words:
        assert word in output, output
    assert len(re.findall(r"(?m)^(?:\w+Error|.*: error): ", output)) == 1, output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a cfg.py and its completed run; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("trained")
    write_cfg(folder)
    done = launch("cfg.py", cwd=folder)
    assert done.code == 0, done.text
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def snapshot(run: Path) -> dict[str, bytes]:
    """Return every file of a run except its logs and its lock."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and "logs" not in path.parts and path.name != ".lock"
    }


@pytest.fixture
def untouched(folder: Path) -> Iterator[None]:
    """Check that the existing run is the same after the test, to the last byte."""
    before = snapshot(folder / "runs" / "small")
    yield
    assert snapshot(folder / "runs" / "small") == before


@pytest.mark.usefixtures("untouched")
class TestBeforeAnythingIsTouched:
    def test_no_such_file(self, folder: Path) -> None:
        refused(launch("cgf.py", cwd=folder), "cgf.py", "cfg.py", code=2)

    def test_syntax_error(self, folder: Path) -> None:
        (folder / "bad.py").write_text("import torch\nconfig = Config(name='x'\n")
        refused(launch("bad.py", cwd=folder), "config = Config(name='x'", "line 2", code=2)

    def test_without_config(self, folder: Path) -> None:
        (folder / "bad.py").write_text("configuration = 3\n")
        refused(launch("bad.py", cwd=folder), "config = Config(", code=2)

    def test_unknown_override(self, folder: Path) -> None:
        refused(launch("cfg.py", "max_epoch=3", cwd=folder), "max_epochs", code=2)

    def test_ill_typed_override(self, folder: Path) -> None:
        refused(launch("cfg.py", "max_epochs=many", cwd=folder), "many", "max_epochs", code=2)

    def test_ill_typed_keyword_of_a_partial(self, folder: Path) -> None:
        refused(launch("cfg.py", "optimizer.lr=fast", cwd=folder), "fast", "optimizer.lr", code=2)

    def test_slots_that_do_not_divide_the_batch(self, folder: Path) -> None:
        refused(launch("cfg.py", "global_batch_size=42", cwd=folder), "global_batch_size=42", "40 or 44", code=2)

    def test_more_ranks_than_slots(self, folder: Path) -> None:
        refused(launch("cfg.py", "num_slots=1", "name=other", ranks=2, cwd=folder), "num_slots=1", "2 ranks")

    def test_another_config(self, folder: Path) -> None:
        refused(launch("cfg.py", "optimizer.lr=0.5", cwd=folder), "optimizer.lr", "0.001", "0.5", "--fresh", code=2)

    def test_a_run_directory_that_cannot_be_written(self, folder: Path) -> None:
        (folder / "blocked").write_text("a file in place of a folder")
        refused(launch("cfg.py", "--runs", "blocked/here", cwd=folder), "blocked/here", "--runs", code=2)

    def test_fresh_with_data_that_cannot_be_used(self, folder: Path) -> None:
        write_cfg(folder, "fields['train_data'] = lambda: torch.utils.data.TensorDataset(torch.zeros(0))")
        refused(launch("cfg.py", "--fresh", cwd=folder), "empty")

    def test_an_interpreter_without_arguments(self, folder: Path) -> None:
        refused(launch(cwd=folder), "usage:", code=2)


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_empty_dataset(tmp_path: Path, ranks: int) -> None:
    write_cfg(tmp_path, "fields['train_data'] = lambda: torch.utils.data.TensorDataset(torch.zeros(0))")
    refused(launch("cfg.py", ranks=ranks, cwd=tmp_path), "empty")


def test_dataset_smaller_than_a_global_batch(tmp_path: Path) -> None:
    write_cfg(tmp_path)
    refused(launch("cfg.py", "global_batch_size=400", cwd=tmp_path), "global_batch_size=400", "200")


def test_configs_that_differ_between_the_ranks(tmp_path: Path) -> None:
    write_cfg(tmp_path, "import os\nfields['seed'] = 5 + int(os.environ['RANK'])")
    refused(launch("cfg.py", ranks=2, cwd=tmp_path), "seed: rank 0 has 5, rank 1 has 6")


def test_model_that_raises_on_one_rank_only(tmp_path: Path) -> None:
    change = """
    import os
    def picky():
        if os.environ["RANK"] == "1":
            raise ValueError("no room for me here")
        return net()
    fields["model"] = picky
    """
    write_cfg(tmp_path, change)
    done = launch("cfg.py", ranks=2, cwd=tmp_path)
    refused(done, "no room for me here", "model raised ValueError", "cfg.py")
    assert not checkpoints(tmp_path / "runs" / "small")


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [pytest.param(0, 0, marks=pytest.mark.slow), (0, 2), (2, 0), pytest.param(2, 1, marks=pytest.mark.slow)],
)
def test_dataset_that_raises_on_one_sample(tmp_path: Path, ranks: int, workers: int) -> None:
    change = """
    class Torn(Noisy):
        def __getitem__(self, i):
            if i == 123:
                raise OSError("the scan is torn")
            return super().__getitem__(i)
    fields["train_data"] = Torn
    """
    write_cfg(tmp_path, change)
    done = launch("cfg.py", f"num_workers={workers}", ranks=ranks, cwd=tmp_path)
    refused(done, "the scan is torn", "123")


MISTAKES = [
    (
        "fields['train_data'] = lambda: [{'x': torch.zeros(64), 'y': 0}] * 80",
        ["ConfigError: train_data (cfg.py:", "'x', 'y'"],
    ),
    ("fields.update(loss=None, forward=lambda model, batch: {'loss': 0})", ["ConfigError: forward (cfg.py:", "'loss'"]),
    ("fields['model'] = lambda: nn.Linear(64, 3)", ["CodeError: loss (cfg.py:", "Target", "one more output"]),
]


@pytest.mark.parametrize(("change", "words"), MISTAKES)
def test_a_mistake_in_what_a_step_calls(tmp_path: Path, change: str, words: list[str]) -> None:
    write_cfg(tmp_path, change)
    refused(launch("cfg.py", cwd=tmp_path), *words, code=2)


def test_a_mistake_that_one_rank_alone_meets(tmp_path: Path) -> None:
    change = """
    import os
    def narrow(samples):
        x, y = torch.utils.data.default_collate(samples)
        return x[:, :63] if os.environ["RANK"] == "1" else x, y
    fields["collate"] = narrow
    """
    write_cfg(tmp_path, change)
    done = launch("cfg.py", ranks=2, cwd=tmp_path)
    refused(done, "CodeError: model (cfg.py:", "in its module 0 (Linear)", "63")


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_loss_that_becomes_nan(tmp_path: Path, ranks: int) -> None:
    change = """
    class Bursts(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()
            self.register_buffer("steps", torch.zeros(()))
        def forward(self, x):
            if self.training:
                self.steps += 1
            return self.body(x) * torch.where(self.steps == 8, torch.nan, 1.0)
    fields.update(model=Bursts)
    """
    write_cfg(tmp_path, change)  # 5 steps per epoch: step 8 comes after the checkpoint of step 5
    done = launch("cfg.py", ranks=ranks, cwd=tmp_path)
    refused(done, "became nan at step 8", "on_nan=skip")
    assert checkpoints(tmp_path / "runs" / "small") == [5]
    skipped = launch("cfg.py", "on_nan=skip", ranks=ranks, cwd=tmp_path)
    assert skipped.code == 0, skipped.text
    assert "completed; the updates of 1 were left out" in skipped.out
    assert result(tmp_path / "runs" / "small")["skipped_steps"] == 1
    longer = launch("cfg.py", "on_nan=skip", "max_epochs=4", cwd=tmp_path)
    assert longer.code == 0, longer.text
    assert result(tmp_path / "runs" / "small")["skipped_steps"] == 1  # of the whole run, over all its launches


UNPOOLS = """
class Unpools(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()
        self.pool, self.unpool = nn.MaxPool1d(2, return_indices=True), nn.MaxUnpool1d(2)
    def forward(self, x):
        return self.body(self.unpool(*self.pool(x)))
fields["model"] = Unpools
"""


@pytest.mark.parametrize("ranks", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_operation_without_a_deterministic_kernel(tmp_path: Path, ranks: int) -> None:
    write_cfg(tmp_path, UNPOOLS)
    done = launch("cfg.py", ranks=ranks, cwd=tmp_path)
    refused(done, "max_unpooling2d", "called in forward", "cfg.py", "deterministic=false", code=1 if ranks else 2)
    warned = launch("cfg.py", "deterministic=false", ranks=ranks, cwd=tmp_path)
    assert warned.code == 0, warned.text
    assert "WARNING: deterministic=false" in warned.out
    assert "max_unpooling2d" in warned.err  # torch's own warning


def test_corrupt_newest_checkpoint(folder: Path) -> None:
    run = folder / "runs" / "small"
    whole = result(run)["params_sha256"]
    (run / "result.json").unlink()
    tensors = run / "checkpoints" / "step-00000015" / "tensors.safetensors"
    damaged = bytearray(tensors.read_bytes())
    damaged[-40] ^= 1
    tensors.write_bytes(damaged)
    done = launch("cfg.py", cwd=folder)
    assert done.code == 0, done.text
    assert "step-00000015" in done.out
    assert "tensors.safetensors" in done.out
    assert "resuming from step 10" in done.out
    assert result(run)["params_sha256"] == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mount: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_full_disk(tmp_path: Path, small_disk: Path) -> None:
    write_cfg(tmp_path, "fields['checkpoint'] = {'keep': 10}")
    done = launch("cfg.py", "max_epochs=40", "--runs", small_disk, cwd=tmp_path)
    refused(done, "No space left", code=1)
    saved = checkpoints(small_disk / "small")
    assert saved, "the checkpoints that were saved before the disk was full must stay"
    shutil.copytree(small_disk / "small", tmp_path / "runs" / "small")
    resumed = launch("cfg.py", "max_epochs=40", cwd=tmp_path)
    assert resumed.code == 0, resumed.text
    assert f"resuming from step {saved[-1]}" in resumed.out


def test_a_run_that_another_process_trains(tmp_path: Path) -> None:
    change = """
    import subprocess, sys
    def second(trainer, run):
        def launch_again():
            again = [sys.executable, "-m", "disttrain.launch", "cfg.py"]
            done = subprocess.run(again, capture_output=True, text=True)
            print("SECOND", done.returncode, done.stderr.strip().replace("\\n", " "), flush=True)
        from disttrain.engine import Events
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), launch_again)
    fields["handlers"] = [second]
    """
    write_cfg(tmp_path, change)
    done = launch("cfg.py", cwd=tmp_path)
    assert done.code == 0, done.text
    second = next(line for line in done.out.splitlines() if line.startswith("SECOND"))
    assert second.startswith("SECOND 2")
    assert "in use by process" in second
