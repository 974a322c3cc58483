"""Checkpoints through fsspec, in its memory and its local file system: committed, verified, skipped, removed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from checkpoint_shards import load_spread, spread
from checkpoint_states import files, mark_of, marked, training_state
from ranks import Ranks

from disttrain.backend import Backend
from disttrain.checkpoint import (
    AsynchronousSaver,
    DirectorySaver,
    load_newest,
    rotate,
    save,
    store_at,
    survey,
)
from disttrain.checkpoint.remote_store import RemoteStore
from disttrain.commands.main import main
from disttrain.engine import Engine, Events
from disttrain.errors import CheckpointError
from disttrain.handlers.checkpoint import Checkpoint

FILES = ("MANIFEST.json", "SHA256SUMS", "tensors.safetensors")


@pytest.fixture(params=["memory", "local"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty store, of each kind."""
    if request.param == "local":
        yield f"local://{tmp_path}/bucket/runs/digits"
        return
    yield "memory://bucket/runs/digits"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def opened(url: str) -> tuple[Any, str]:
    fs, root = fsspec.core.url_to_fs(url)
    return fs, str(root)


def names(url: str) -> list[str]:
    """Return the names of the committed checkpoints without the unique endings of their uploads."""
    return [name.partition(".")[0] for name in store_at(url).committed()]


def damage(url: str, step: int, file: str, how: str) -> None:
    fs, root = opened(url)
    store = store_at(url)
    [name] = [name for name in store.committed() if name.startswith(f"step-{step:08d}.")]
    path = f"{root}/{name}/{file}"
    content = fs.cat_file(path)
    if how == "removed":
        fs.rm_file(path)
    elif how == "another step's":
        [other] = [name for name in store.committed() if name.startswith("step-00000020.")]
        fs.pipe_file(path, fs.cat_file(f"{root}/{other}/{file}"))
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        fs.pipe_file(path, {"flipped": flipped, "truncated": content[:middle], "emptied": b""}[how])


def test_a_saved_state_is_loaded_and_the_oldest_goes(url: str) -> None:
    assert load_newest(url) is None
    for step in (10, 20, 30):
        assert str(save(url, step, marked(step), keep=2)).startswith(f"{url}/step-{step:08d}.")
    assert names(url) == ["step-00000030", "step-00000020"]
    loaded = load_newest(url)
    assert loaded is not None
    assert mark_of(loaded.state) == loaded.manifest.step == 30
    assert (loaded.name, loaded.skipped) == ("step-00000030", [])
    fs, root = opened(url)
    assert sorted({path.split("/")[-1] for path in fs.find(root)}) == sorted(FILES)
    assert len(fs.find(root)) == 6


def test_the_bytes_are_those_of_a_local_checkpoint(url: str, tmp_path: Path) -> None:
    save(url, 5, training_state())
    store = store_at(url)
    with store.opened(store.committed()[0]) as directory:
        assert files(directory) == files(save(tmp_path / "c", 5, training_state()))
        kept = directory
    assert not kept.exists()


@pytest.mark.parametrize("how", ["flipped", "truncated", "emptied", "removed", "another step's"])
@pytest.mark.parametrize("file", FILES)
def test_remote_damage_is_refused_and_named_and_an_older_one_is_loaded(
    url: str, file: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20, 30):
        save(url, step, marked(step))
    damage(url, 30, file, how)
    loaded = load_newest(url)
    assert loaded is not None
    assert mark_of(loaded.state) == 20
    if (file, how) == ("MANIFEST.json", "removed"):  # an upload without it counts as cut off
        assert loaded.skipped == []
        return
    [(skipped, reason)] = loaded.skipped
    assert skipped.startswith("step-00000030.")
    assert file in reason
    assert "is damaged, going back to step 20" in caplog.text
    assert names(url) == ["step-00000020", "step-00000010"]
    assert [entry.state for entry in survey(url)] == ["good", "good", "damaged"]
    again = load_newest(url)
    assert again is not None
    assert again.skipped == []


def test_without_a_good_one_each_load_is_an_error(url: str) -> None:
    save(url, 30, marked(30))
    damage(url, 30, "tensors.safetensors", "emptied")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged.*tensors\.safetensors has 0"):
            load_newest(url)


def test_an_upload_that_was_cut_off_is_never_read_and_the_next_run_removes_it(url: str) -> None:
    fs, root = opened(url)
    save(url, 10, marked(10))
    for name, content in (("step-00000020.0a1b2c3d/tensors.safetensors", b"x"), ("notes/mine.txt", b"mine")):
        fs.makedirs(f"{root}/{name.partition('/')[0]}", exist_ok=True)
        fs.pipe_file(f"{root}/{name}", content)
    loaded = load_newest(url)
    assert loaded is not None
    assert loaded.manifest.step == 10
    assert [entry.state for entry in survey(url)] == ["good", "tmp"]
    DirectorySaver(url)(marked(30), "step-00000030", {})
    assert [entry.state for entry in survey(url)] == ["good", "good"]
    assert fs.cat_file(f"{root}/notes/mine.txt") == b"mine"


@pytest.mark.parametrize("file", FILES)
def test_an_upload_that_fails_leaves_nothing_that_looks_good(
    url: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(url, 10, marked(10))
    kind = type(opened(url)[0])
    for method in ("pipe_file", "_open"):
        real = getattr(kind, method)

        def failing(fs: Any, path: str, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            if path.endswith(file):
                raise TimeoutError("the store does not answer")
            return real(fs, path, *args, **kwargs)

        monkeypatch.setattr(kind, method, failing)
    with pytest.raises(CheckpointError, match=rf"cannot reach the checkpoints in {re.escape(url)}: the store does not"):
        save(url, 20, marked(20))
    monkeypatch.undo()
    assert [(entry.step, entry.state) for entry in survey(url)] == [(10, "good")]


def test_an_upload_that_did_not_arrive_whole_is_not_committed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RemoteStore._files

    def shorter(store: RemoteStore, name: str) -> Any:
        return {file: {**info, "size": info["size"] - 1} for file, info in real(store, name).items()}

    monkeypatch.setattr(RemoteStore, "_files", shorter)
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors did not arrive: expected \d+ bytes"):
        save(url, 20, marked(20))
    assert survey(url) == []


def test_another_state_of_the_same_step_replaces_it_remotely(url: str) -> None:
    save(url, 5, marked(4))
    save(url, 5, marked(6))
    assert names(url) == ["step-00000005"]
    loaded = load_newest(url)
    assert loaded is not None
    assert mark_of(loaded.state) == 6


def test_savers_and_retention(url: str) -> None:
    saver = DirectorySaver(url)
    for step in (1, 2, 3):
        saver(marked(step), f"step-{step:08d}", {})
    assert [step for step, _ in saver.saved()] == [1, 2, 3]
    saver.remove("step-00000001")
    assert names(url) == ["step-00000003", "step-00000002"]
    with AsynchronousSaver(url) as background:
        background(marked(4), "step-00000004", {})
        background.settle()
    assert len(rotate(url, 2)) == 1
    assert names(url) == ["step-00000004", "step-00000003"]


def test_a_checkpoint_handler_saves_there(url: str) -> None:
    model = torch.nn.Linear(2, 3)
    handler = Checkpoint({"model": model}, DirectorySaver(url), n_saved=2)
    trainer = Engine(lambda engine, batch: None)
    handler.attach(trainer, Events.ITERATION_COMPLETED)
    trainer.run(range(4))
    assert names(url) == ["step-00000004", "step-00000003"]
    assert handler.last_checkpoint == f"{url}/step-00000004"
    loaded = load_newest(url)
    assert loaded is not None
    assert torch.equal(loaded.state["weight"], model.weight)


def load_on_ranks(backend: Backend, url: str) -> int:
    save(url, 7, marked(7), backend=backend)
    loaded = load_newest(url, backend)
    assert loaded is not None
    return mark_of(loaded.state)


def test_every_rank_loads_a_copy_of_its_own(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(2, load_on_ranks, f"local://{tmp_path}/c") == [7, 7]


def save_parts_and_load(backend: Backend, url: str) -> None:
    """Save DTensors in both ways, each rank its part, and load the newest in every way."""
    for saver in (DirectorySaver(url, backend=backend), AsynchronousSaver(url, backend=backend)):
        for step in (1, 2) if isinstance(saver, AsynchronousSaver) else (3,):
            saver(spread(backend, step), f"step-{step:08d}", {})
        saver.settle()
    load_spread(backend, url)


def test_every_rank_uploads_its_part(ranks: Ranks, tmp_path: Path) -> None:
    url = f"local://{tmp_path}/c"
    ranks(2, save_parts_and_load, url)
    assert [(entry.step, entry.state) for entry in survey(url)] == [(3, "good"), (2, "good"), (1, "good")]
    assert {len(os.listdir(path)) for path in (tmp_path / "c").iterdir()} == {4}


def test_the_command_reads_a_url(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20, 30):
        save(url, step, marked(step))
    damage(url, 20, "tensors.safetensors", "flipped")
    assert main(["checkpoint", "ls", url, "--quick"]) == 0
    assert capsys.readouterr().out.count("complete") == 3
    assert main(["checkpoint", "verify", url]) == 1
    assert re.search(r"step-00000020\.\w{8}: DAMAGED: tensors\.safetensors does not", capsys.readouterr().out)
    assert main(["checkpoint", "show", url, "--step", "10"]) == 0
    assert "model.0.weight" in capsys.readouterr().out
    assert main(["checkpoint", "show", f"{url}/{store_at(url).committed()[0]}"]) == 0
    assert main(["checkpoint", "prune", url, "--keep", "1", "--yes", "--damaged"]) == 0
    assert names(url) == ["step-00000030"]
    if url.startswith("local"):
        assert len(os.listdir(url.removeprefix("local://"))) == 1


def test_a_missing_package_is_named() -> None:
    with pytest.raises(CheckpointError, match="no-such-store"):
        store_at("no-such-store://bucket/x")
    # In another process, which cannot import fsspec.
    code = (
        "import sys; sys.modules['fsspec'] = sys.modules['fsspec.core'] = None\n"
        "from disttrain.checkpoint.remote_store import RemoteStore\n"
        "try:\n    RemoteStore('s3://bucket/x')\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "CheckpointError" in done.stdout, done.stderr
    assert "pip install 'disttrain[remote]'" in done.stdout


def test_folders_are_made_but_never_the_first(tmp_path: Path) -> None:
    made: list[str] = []

    class Store:
        def isdir(self, path: str) -> bool:
            return path in ("bucket", "/srv") or path in made

        def mkdir(self, path: str, create_parents: bool) -> None:
            assert not create_parents
            made.append(path)

    store = RemoteStore(f"local://{tmp_path}")
    store._fs = Store()
    store._make_folders("bucket/runs/digits")
    store._make_folders("/srv/runs")
    assert made == ["bucket/runs", "bucket/runs/digits", "/srv/runs"]
