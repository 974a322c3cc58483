"""Checkpoints through fsspec, in its memory and its local file system: committed, verified, gone round, removed."""

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
from checkpoint_states import files, mark_of, marked, training_state
from ranks import Ranks

from disttrain.backend import Backend
from disttrain.checkpoint import (
    AsynchronousSaver,
    DirectorySaver,
    folder_under,
    load_newest,
    place_of,
    rotate,
    save,
    survey,
)
from disttrain.checkpoint.local import LocalPlace
from disttrain.checkpoint.remote import RemotePlace
from disttrain.cli import main
from disttrain.engine import Engine, Events
from disttrain.errors import CheckpointError
from disttrain.handlers.checkpoint import Checkpoint

FILES = ("MANIFEST.json", "SHA256SUMS", "tensors.safetensors")


@pytest.fixture(params=["memory", "local"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place of each kind."""
    if request.param == "local":
        yield f"local://{tmp_path}/bucket/runs/digits"
        return
    yield "memory://bucket/runs/digits"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def store(url: str) -> tuple[Any, str]:
    fs, root = fsspec.core.url_to_fs(url)
    return fs, str(root)


def names(url: str) -> list[str]:
    """Return the committed ones' names without what makes each upload's its own."""
    return [name.partition(".")[0] for name in place_of(url).committed()]


def damage(url: str, step: int, file: str, how: str) -> None:
    fs, root = store(url)
    place = place_of(url)
    [name] = [name for name in place.committed() if name.startswith(f"step-{step:08d}.")]
    path = f"{root}/{name}/{file}"
    content = fs.cat_file(path)
    if how == "removed":
        fs.rm_file(path)
    elif how == "another step's":
        [other] = [name for name in place.committed() if name.startswith("step-00000020.")]
        fs.pipe_file(path, fs.cat_file(f"{root}/{other}/{file}"))
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        fs.pipe_file(path, {"flipped": flipped, "truncated": content[:middle], "emptied": b""}[how])


def test_what_is_saved_is_loaded_and_the_oldest_goes(url: str) -> None:
    assert load_newest(url) is None
    for step in (10, 20, 30):
        assert str(save(url, step, marked(step), keep=2)).startswith(f"{url}/step-{step:08d}.")
    assert names(url) == ["step-00000030", "step-00000020"]
    loaded = load_newest(url)
    assert loaded is not None
    assert mark_of(loaded.state) == loaded.manifest.step == 30
    assert (loaded.name, loaded.skipped) == ("step-00000030", [])
    fs, root = store(url)
    assert sorted({path.split("/")[-1] for path in fs.find(root)}) == sorted(FILES)
    assert len(fs.find(root)) == 6


def test_the_bytes_are_those_of_a_local_checkpoint(url: str, tmp_path: Path) -> None:
    save(url, 5, training_state())
    place = place_of(url)
    with place.opened(place.committed()[0]) as directory:
        assert files(directory) == files(save(tmp_path / "c", 5, training_state()))
        kept = directory
    assert not kept.exists()


@pytest.mark.parametrize("how", ["flipped", "truncated", "emptied", "removed", "another step's"])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_refused_named_and_gone_round(
    url: str, file: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20, 30):
        save(url, step, marked(step))
    damage(url, 30, file, how)
    loaded = load_newest(url)
    assert loaded is not None
    assert mark_of(loaded.state) == 20
    if (file, how) == ("MANIFEST.json", "removed"):  # without it an upload is one that was cut off
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


def test_where_none_is_good_it_is_said(url: str) -> None:
    save(url, 30, marked(30))
    damage(url, 30, "tensors.safetensors", "emptied")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged.*tensors\.safetensors has 0"):
            load_newest(url)


def test_an_upload_that_was_cut_off_is_never_read_and_removed_by_the_next_run(url: str) -> None:
    fs, root = store(url)
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
    kind = type(store(url)[0])
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
    real = RemotePlace._files

    def shorter(place: RemotePlace, name: str) -> Any:
        return {file: {**info, "size": info["size"] - 1} for file, info in real(place, name).items()}

    monkeypatch.setattr(RemotePlace, "_files", shorter)
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors did not arrive: expected \d+ bytes"):
        save(url, 20, marked(20))
    assert survey(url) == []


def test_another_state_of_the_same_step_takes_its_place(url: str) -> None:
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
    assert main(["checkpoint", "show", f"{url}/{place_of(url).committed()[0]}"]) == 0
    assert main(["checkpoint", "prune", url, "--keep", "1", "--yes", "--damaged"]) == 0
    assert names(url) == ["step-00000030"]
    if url.startswith("local"):
        assert len(os.listdir(url.removeprefix("local://"))) == 1


def test_what_a_name_means(tmp_path: Path) -> None:
    for path in (str(tmp_path), tmp_path, f"file://{tmp_path}"):
        place = place_of(path)
        assert isinstance(place, LocalPlace)
        assert place.root == tmp_path
    assert isinstance(place_of("memory://b/c"), RemotePlace)
    assert folder_under("s3://bucket/runs/", "digits") == "s3://bucket/runs/digits"


def test_a_store_whose_package_is_missing_says_which() -> None:
    with pytest.raises(CheckpointError, match="no-such-store"):
        place_of("no-such-store://bucket/x")
    # Another process, where fsspec cannot be imported.
    code = (
        "import sys; sys.modules['fsspec'] = sys.modules['fsspec.core'] = None\n"
        "from disttrain.checkpoint.remote import RemotePlace\n"
        "try:\n    RemotePlace('s3://bucket/x')\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
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

    place = RemotePlace(f"local://{tmp_path}")
    place._fs = Store()
    place._make_folders("bucket/runs/digits")
    place._make_folders("/srv/runs")
    assert made == ["bucket/runs", "bucket/runs/digits", "/srv/runs"]
