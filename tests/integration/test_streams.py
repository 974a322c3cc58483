"""Training over streams by the real commands: killed and resumed on other ranks and workers, with the same bits."""

import random
import re
from pathlib import Path

import pytest
from commands import ROOT, Done, launch, lines, result, write_cfg

from disttrain.backend import connect
from disttrain.config import load_config
from disttrain.data import StreamLoader
from disttrain.errors import ConfigError
from disttrain.parallel import Slots
from disttrain.run.data import loader_of

slow = pytest.mark.slow
STEPS = 14  # a pass of the stream has 4 steps: four shards of 40 samples each, or 160 samples

STREAM = """
from torch.utils.data import IterableDataset

class Stream(IterableDataset):
    "Leaves out other samples in each pass, and shuffles in a small buffer."
    def __init__(self, part=slice(None)):
        self.part, self.epoch = part, 0
    def set_epoch(self, epoch):
        self.epoch = epoch
    def numbers(self):
        return [i for i in range(200)[self.part] if (i + self.epoch) % 5]
    def __iter__(self):
        data, buffer = Noisy(), []
        for i in self.numbers():
            buffer.append(data[i])
            if len(buffer) > 3:
                yield buffer.pop(random.randrange(4))
        yield from buffer

class Shards(Stream):
    def shard(self, num_shards, index):
        return type(self)(slice(index, None, num_shards))

class Remembering(Shards):
    at = 0
    def __iter__(self):
        data, numbers = Noisy(), self.numbers()
        while self.at < len(numbers):
            self.at += 1
            yield data[numbers[self.at - 1]]
        self.at = 0
    def state_dict(self):
        return {"at": self.at}
    def load_state_dict(self, state):
        self.at = state["at"]

fields.update(train_data=KIND, max_epochs=None, max_steps=14)
"""

DIES = """
import os, signal, pathlib
from disttrain.engine import Events
def dies(trainer, run):
    mark = pathlib.Path("died")
    def die():
        if run.backend.rank == run.backend.world_size - 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=STEP), die)
fields["handlers"] = [dies]
"""


def cfg(folder: Path, kind: str, change: str = "") -> None:
    write_cfg(folder, STREAM.replace("KIND", kind) + change)


def run(folder: Path, *words: object, ranks: int = 0) -> Done:
    return launch("cfg.py", *words, ranks=ranks, cwd=folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of an uninterrupted run by kind of stream; each run is made when it is first needed."""

    class Runs(dict[str, Path]):
        def __missing__(self, kind: str) -> Path:
            self[kind] = folder = tmp_path_factory.mktemp(kind)
            cfg(folder, kind)
            done = run(folder)
            assert done.code == 0, done.text
            return folder

    return Runs()


def same_as(whole: Path, folder: Path) -> None:
    expected, got = result(whole / "runs/small"), result(folder / "runs/small")
    for field in ("status", "step", "epoch", "params_sha256", "metrics"):
        assert got[field] == expected[field], field
    for file in ("metrics/train.jsonl", "metrics/valid.jsonl", "ledger.jsonl"):
        assert lines(folder / "runs/small" / file) == lines(whole / "runs/small" / file), file


@pytest.mark.parametrize(
    ("kind", "first", "then"),
    [
        ("Shards", (2, 1), (3, 0)),
        pytest.param("Shards", (0, 3), (4, 1), marks=slow),
        pytest.param("Remembering", (3, 0), (2, 2), marks=slow),
        pytest.param("Remembering", (0, 0), (4, 0), marks=slow),
        pytest.param("Stream", (2, 0), (3, 1), marks=slow),
        pytest.param("Stream", (3, 1), (0, 0), marks=slow),
    ],
)
def test_killed_at_a_random_step_and_resumed_elsewhere(
    whole: dict[str, Path], tmp_path: Path, kind: str, first: tuple[int, int], then: tuple[int, int]
) -> None:
    step = random.SystemRandom().randint(1, STEPS)
    print("killed at step", step)  # shown when the test fails
    cfg(tmp_path, kind, DIES.replace("STEP", str(step)))
    (ranks, workers), (other_ranks, other_workers) = first, then
    assert run(tmp_path, f"num_workers={workers}", "checkpoint.every_steps=3", ranks=ranks).code != 0
    assert (tmp_path / "died").exists()
    done = run(tmp_path, f"num_workers={other_workers}", ranks=other_ranks)
    assert done.code == 0, done.text
    assert ("resuming from step" in done.out) == (step > 3)
    same_as(whole[kind], tmp_path)


def test_epochs_are_the_passes(whole: dict[str, Path]) -> None:
    folder = whole["Shards"] / "runs/small"
    assert [line["epoch"] for line in lines(folder / "metrics/train.jsonl")] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 2
    assert [line["step"] for line in lines(folder / "metrics/valid.jsonl")] == [4, 8, 12, 14]
    ended = result(folder)
    assert (ended["step"], ended["epoch"]) == (14, 4)


@slow
def test_a_stream_that_fails_on_one_rank_ends_all(tmp_path: Path) -> None:
    change = """
class Torn(Shards):
    def __iter__(self):
        for number, sample in enumerate(super().__iter__()):
            if self.part.start == 3 and number == 15:
                raise OSError("the tape is torn")
            yield sample
fields["train_data"] = Torn
"""
    cfg(tmp_path, "Shards", change)
    done = run(tmp_path, ranks=2)
    assert done.code == 1
    output = done.rank_output()
    assert "Traceback" not in output
    assert re.search(
        r"the stream raised OSError: the tape is torn \(\S*cfg.py:\d+ in __iter__\), making sample 5 of the "
        r"microbatch of epoch=0, step=1, slot=3",
        output,
    )


@slow
def test_the_commands_of_the_page_train_and_resume(tmp_path: Path) -> None:
    page = (ROOT / "docs/streams.md").read_text()
    (code,) = re.findall(r"(?ms)^```python file=stream.py\n(.*?)^```$", page)
    (tmp_path / "stream.py").write_text(code)
    (commands,) = re.findall(r"(?ms)^```bash run\n(.*?)^```$", page)
    for line in commands.splitlines():
        ranks = int((re.findall(r"--nproc-per-node (\d)", line) or ["0"])[0])
        done = launch(*line.partition("disttrain.launch ")[2].split(), ranks=ranks, cwd=tmp_path)
        assert done.code == 0, done.text
    assert "resuming from step 25 (epoch 2)" in done.out
    assert "dropped" not in done.out
    ended = result(tmp_path / "runs/stream")
    assert (ended["step"], ended["world_size"]) == (60, 3)
    losses = [line["loss"] for line in lines(tmp_path / "runs/stream/metrics/train.jsonl")]
    assert losses[-1] < losses[0] / 2


@slow
def test_the_config_of_the_page_has_the_same_bits_resumed_as_in_one_run(tmp_path: Path) -> None:
    (code,) = re.findall(r"(?ms)^```python file=stream.py\n(.*?)^```$", (ROOT / "docs/streams.md").read_text())
    (tmp_path / "stream.py").write_text(code)
    for words in (["max_steps=25", "name=cut"], ["name=cut", "num_workers=1"], ["name=whole"]):
        assert launch("stream.py", *words, cwd=tmp_path).code == 0
    cut, whole = (result(tmp_path / "runs" / name) for name in ("cut", "whole"))
    assert cut["params_sha256"] == whole["params_sha256"]


@slow
@pytest.mark.parametrize("kind", ["Shards", "Remembering"])
def test_a_signal_saves_and_stops(whole: dict[str, Path], tmp_path: Path, kind: str) -> None:
    for step in (4, 6):  # the last step of a pass, and one inside a pass
        folder = tmp_path / str(step)
        folder.mkdir()
        cfg(folder, kind, DIES.replace("STEP", str(step)).replace("SIGKILL", "SIGTERM"))
        assert run(folder).code == 75
        assert result(folder / "runs/small")["status"] == "interrupted"
        done = run(folder, ranks=2)
        assert done.code == 0, done.text
        same_as(whole[kind], folder)


@slow
def test_other_data_is_refused_unless_it_is_accepted(whole: dict[str, Path], tmp_path: Path) -> None:
    cfg(tmp_path, "Shards")
    assert run(tmp_path, "max_steps=6").code == 0
    # Other samples, with the same length and type.
    cfg(
        tmp_path, "Shards", "\nStream.numbers = lambda self: [i for i in range(200)[self.part] if (i + self.epoch) % 7]"
    )
    refused = run(tmp_path)
    assert refused.code == 2
    assert "step 2 of pass 1 has other samples than before" in refused.err
    accepted = run(tmp_path, "accept_other_data=true")
    assert accepted.code == 0, accepted.text
    assert result(tmp_path / "runs/small")["step"] == STEPS


@slow
def test_a_run_changes_from_samples_with_indices_to_a_stream_if_that_is_accepted(tmp_path: Path) -> None:
    change = "\ndef data(): return {}\nfields.update(train_data=data, max_epochs=None, max_steps=7)"
    cfg(tmp_path, "Shards", change.format("Noisy()"))
    assert run(tmp_path).code == 0
    cfg(tmp_path, "Shards", change.format("Shards()"))
    assert "the training data has changed" in run(tmp_path, "max_steps=9").err
    accepted = run(tmp_path, "max_steps=9", "accept_other_data=true")
    assert accepted.code == 0, accepted.text
    assert "7 steps of the training data are read and dropped" in accepted.out
    assert "resuming from step 7 (epoch 2)" in accepted.out
    ended = result(tmp_path / "runs/small")
    assert (ended["step"], ended["epoch"]) == (9, 3)


class TestLengths:
    """The end of a run over a stream."""

    def loader(self, folder: Path, change: str) -> StreamLoader:
        cfg(folder, "Shards", change)
        config = load_config(folder / "cfg.py")
        with connect("single") as backend:
            loader, data = loader_of(config, config.train_data(), Slots(4, 0, 1), backend)
        assert isinstance(loader, StreamLoader)
        assert data["shards"] == 4
        return loader

    def test_epochs_need_a_length(self, tmp_path: Path) -> None:
        change = "\nfields.update(max_epochs=2, max_steps=None)"
        with pytest.raises(ConfigError, match=r"max_epochs=2: expected training data of a known length.* by max_steps"):
            self.loader(tmp_path, change)
        with pytest.raises(ConfigError, match="got a stream with a length of 30"):
            self.loader(tmp_path, change + "\nStream.__len__ = lambda self: 30")
        self.loader(tmp_path, change + "\nStream.__len__ = lambda self: 160")

    @slow
    def test_with_a_length_epochs_are_counted_in_steps(self, tmp_path: Path) -> None:
        cfg(tmp_path, "Shards", "\nfields.update(max_epochs=2, max_steps=None)\nStream.__len__ = lambda self: 160")
        done = run(tmp_path)
        assert done.code == 0, done.text
        ended = result(tmp_path / "runs/small")
        assert (ended["step"], ended["epoch"]) == (8, 2)
        assert "is completed" in run(tmp_path).out
