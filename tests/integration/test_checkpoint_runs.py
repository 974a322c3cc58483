"""Whole runs that save asynchronously or into a target, and runs that are killed while they save constantly."""

import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import launch, write_cfg

from disttrain.checkpoint import AsynchronousSaver, committed, staging, store_at, survey
from disttrain.checkpoint.local_store import LocalStore
from disttrain.checkpoint.manifest import FileRecord
from disttrain.commands import exit_codes
from disttrain.commands import launch as launch_command
from disttrain.commands.main import main
from disttrain.commands.start_ranks import PRELOAD
from disttrain.engine import Engine, Events
from disttrain.handlers import preemption
from disttrain.launching.local_ranks import LocalRanks
from disttrain.run.state import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "soak"))

from kills import CFG, Campaign


@dataclass(frozen=True)
class At:
    """A handler by which every rank performs an action at the end of one step."""

    step: int
    action: str
    changes_nothing = True

    def __call__(self, trainer: Engine, run: Run) -> None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=self.step), getattr(self, self.action), run)

    def sigterm(self, run: Run) -> None:
        signal.raise_signal(signal.SIGTERM)

    def full_disk(self, run: Run) -> None:
        while not store_at(run.directory.checkpoints).committed():
            time.sleep(0.01)  # the previous save may still be under way

        def fails(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        os.fsync = fails


@dataclass(frozen=True)
class SlowSaves:
    """A handler by which saves into `folder` take two seconds, and rank 0 gets SIGTERM in step 5 and a second to end.

    From the second asynchronous save on, a save takes until the run waits for it at its end.
    """

    folder: str
    changes_nothing = True

    def __call__(self, trainer: Engine, run: Run) -> None:
        write_part, settle = LocalStore.write_part, AsynchronousSaver.settle
        done = threading.Event()
        asynchronous, count = run.config.checkpoint.asynchronous, itertools.count(1)

        def slow(store: LocalStore, *words: Any) -> FileRecord:
            if str(store).startswith(self.folder):
                time.sleep(2.0)
                if asynchronous and next(count) > 1:
                    done.wait(60)
            return write_part(store, *words)

        def settling(saver: AsynchronousSaver) -> None:
            if trainer.state.iteration >= 5:
                done.set()
            settle(saver)

        LocalStore.write_part = slow  # type: ignore[method-assign]  # in this process, which ends with the run
        AsynchronousSaver.settle = settling  # type: ignore[method-assign]
        if run.backend.rank == 0:
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), send_sigterm)


def send_sigterm() -> None:
    """Send SIGTERM and wait until the run knows it: one step later, a save that is due would already have begun."""
    signal.raise_signal(signal.SIGTERM)
    while preemption._installed is not None and not preemption._installed.asked():
        time.sleep(0.001)


class SlowCopies:
    """A handler by which the copy beside the next step takes longer than that step."""

    changes_nothing = True

    def __call__(self, trainer: Engine, run: Run) -> None:
        copy_all = staging._copy_all

        def slow(pairs: Sequence[Any]) -> None:
            if threading.current_thread().name == "disttrain-checkpoint":
                assert pairs
                time.sleep(0.3)
            copy_all(pairs)

        staging._copy_all = slow  # in this process, which ends with the run


def rank_main(words: Sequence[str], handlers: Sequence[Any]) -> int:
    if any(isinstance(handler, SlowSaves) for handler in handlers):
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "1"
    return launch_command.main(words, handlers=handlers)


@dataclass
class Ended:
    """The exit codes of a run's ranks, and their output."""

    codes: list[int]
    output: str


def train(folder: Path, *words: str, steps: int = 6, ranks: int = 1, handler: Any = None, width: int = 64) -> Ended:
    """Run the config of the soak test in folder/runs/soak."""
    cfg = folder / "soak.py"
    cfg.write_text(CFG.format(width=width, num_steps=steps, asynchronous=False))
    logs = folder / f"logs-{len(list(folder.glob('logs-*')))}"
    logs.mkdir()
    command = [str(cfg), "--runs", str(folder / "runs"), *words]
    with LocalRanks(ranks, rank_main, (command, [] if handler is None else [handler]), logs, PRELOAD) as started:
        codes = started.wait()
    return Ended(codes, "".join(log.read_text() for log in started.logs))


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs" / "soak" / "result.json").read_text())


def steps(folder: Path) -> list[int]:
    return sorted(entry.step for entry in survey(folder / "runs" / "soak" / "checkpoints") if entry.state == "good")


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_random_moments_while_it_saves_constantly(tmp_path: Path, asynchronous: bool) -> None:
    # 2.7 MB of state: each rank writes a file.
    report = Campaign(tmp_path, ranks=2, asynchronous=asynchronous, num_steps=40, width=3000).run(3)
    assert report.good, report
    assert report.kills == 3
    assert report.same_bits >= 1


def test_an_asynchronous_run_has_the_bits_of_the_synchronous_one(tmp_path: Path) -> None:
    hashes = []
    for kind in ("false", "true"):
        folder = tmp_path / kind
        folder.mkdir()
        # Large enough to be copied beside the next step, and to be written in parts by each rank.
        ended = train(folder, f"checkpoint.asynchronous={kind}", ranks=2, width=3000, handler=SlowCopies())
        assert ended.codes == [0, 0], ended.output
        assert steps(folder) == [5, 6]
        files = sorted((folder / "runs" / "soak" / "checkpoints" / "step-00000006").glob("tensors-*"))
        assert len(files) == 2
        hashes.append((result(folder)["params_sha256"], [file.read_bytes() for file in files]))
    assert hashes[0] == hashes[1]


def test_sigterm_waits_for_the_save(tmp_path: Path) -> None:
    ended = train(tmp_path, "checkpoint.asynchronous=true", "checkpoint.every_steps=50", handler=At(3, "sigterm"))
    assert ended.codes == [exit_codes.INTERRUPTED], ended.output
    stopped = result(tmp_path)["step"]
    assert result(tmp_path)["status"] == "interrupted"
    assert steps(tmp_path) == [stopped]


def test_a_save_that_fails_stops_every_rank_and_the_older_one_is_used(tmp_path: Path) -> None:
    ended = train(
        tmp_path, "checkpoint.asynchronous=true", "checkpoint.every_steps=2", ranks=2, handler=At(4, "full_disk")
    )
    assert ended.codes == [exit_codes.FAILED, exit_codes.FAILED]
    assert "No space left on device" in ended.output
    assert steps(tmp_path) == [2]
    again = train(tmp_path, "checkpoint.asynchronous=true", ranks=2)
    assert again.codes == [0, 0]
    assert "resuming from step 2" in again.output


@pytest.mark.parametrize("kind", ["path", "url"])
def test_a_run_goes_on_from_its_target_without_its_directory(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "kept") if kind == "path" else f"local://{tmp_path}/kept"
    target = f"checkpoint.target={store}"
    (tmp_path / "whole").mkdir()
    train(tmp_path / "whole")
    first = train(tmp_path, target, "max_steps=3")
    assert first.codes == [0], first.output
    assert f"{store}/soak/step-00000003" in first.output
    assert os.listdir(tmp_path / "runs" / "soak" / "checkpoints") == ["elsewhere.txt"]
    assert [entry.step for entry in survey(store_at(f"{store}/soak"))] == [3, 2]
    capsys.readouterr()
    assert main(["checkpoint", "ls", "--elsewhere", str(tmp_path / "runs" / "soak")]) == 0
    assert capsys.readouterr().out.count("good") == 2

    refused = train(tmp_path, target, "--fresh")
    assert refused.codes == [exit_codes.USAGE]
    assert "--fresh can move a run directory aside, but not the checkpoints in" in refused.output
    shutil.rmtree(tmp_path / "runs")
    refused = train(tmp_path, target, "num_slots=2")
    assert refused.codes == [exit_codes.USAGE]
    assert "num_slots=4 in the checkpoint, 2 here" in refused.output
    shutil.rmtree(tmp_path / "runs")
    ended = train(tmp_path, target, "checkpoint.asynchronous=true")
    assert ended.codes == [0], ended.output
    assert "resuming from step 3" in ended.output
    assert result(tmp_path)["params_sha256"] == result(tmp_path / "whole")["params_sha256"]


@pytest.mark.parametrize("asynchronous", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_a_save_that_would_not_reach_its_target_in_time_goes_to_the_run_directory(
    tmp_path: Path, asynchronous: str
) -> None:
    words = [f"checkpoint.target={tmp_path}/far", "checkpoint.every_steps=2", f"checkpoint.asynchronous={asynchronous}"]
    ended = train(tmp_path, *words, steps=9, ranks=2, handler=SlowSaves(f"{tmp_path}/far"))
    assert ended.codes == [exit_codes.INTERRUPTED] * 2, ended.output
    stopped = result(tmp_path)["step"]
    assert stopped in (5, 6)
    assert f"step {stopped} is saved in {tmp_path}/runs/soak/checkpoints instead" in ended.output
    assert steps(tmp_path) == [stopped]
    again = train(tmp_path, *words, steps=9)
    assert f"resuming from step {stopped}" in again.output
    (tmp_path / "whole").mkdir()
    train(tmp_path / "whole", steps=9)
    assert result(tmp_path)["params_sha256"] == result(tmp_path / "whole")["params_sha256"]


def test_no_new_save_begins_if_only_the_one_under_way_can_end_in_time(tmp_path: Path) -> None:
    words = ["checkpoint.every_steps=2", "checkpoint.asynchronous=true"]
    ended = train(tmp_path, *words, steps=9, ranks=2, handler=SlowSaves(str(tmp_path)))
    assert ended.codes == [exit_codes.INTERRUPTED] * 2, ended.output
    assert f"step {result(tmp_path)['step']} is not saved, so that the save under way can end" in ended.output
    assert (result(tmp_path)["checkpoint"], steps(tmp_path)) == ("step-00000004", [2, 4])
    assert "resuming from step 4" in train(tmp_path, *words, steps=9).output


def test_a_run_resumes_from_its_next_place_if_the_newest_has_no_good_checkpoint(tmp_path: Path) -> None:
    words = [f"checkpoint.target={tmp_path}/far", "max_steps=4"]
    assert train(tmp_path, *words).codes == [0]
    assert train(tmp_path, "max_steps=5", "checkpoint.keep=1").codes == [0]
    near = tmp_path / "runs" / "soak" / "checkpoints"
    os.truncate(near / "step-00000005" / "tensors.safetensors", 0)
    again = train(tmp_path, f"checkpoint.target={tmp_path}/far")
    assert again.codes == [0], again.output
    assert "step-00000005 is damaged" in again.output
    assert "resuming from step 4" in again.output
    (tmp_path / "whole").mkdir()
    train(tmp_path / "whole")
    assert result(tmp_path)["params_sha256"] == result(tmp_path / "whole")["params_sha256"]


def test_a_best_checkpoint_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    write_cfg(tmp_path)
    words = ["cfg.py", "checkpoint.monitor=loss", "checkpoint.mode=max", "checkpoint.keep=2"]
    assert launch(*words, cwd=tmp_path).code == 0
    folder = tmp_path / "runs" / "small"
    assert "step-00000005" in committed(folder / "checkpoints")
    shutil.rmtree(folder / "checkpoints" / "step-00000005")
    again = launch(*words, "max_epochs=4", cwd=tmp_path)
    assert "the checkpoint of step 5, which had the best loss, is in no place of this run" in again.text
    assert json.loads((folder / "result.json").read_text())["best"]["step"] == 20


def test_the_best_checkpoint_stays_on_other_ranks_too(tmp_path: Path) -> None:
    write_cfg(tmp_path)
    # The loss falls, so the first evaluation has the largest loss, at a step that is not saved otherwise.
    best = ("checkpoint.monitor=loss", "checkpoint.mode=max", "checkpoint.keep=2", "checkpoint.every_steps=4")
    words = ["cfg.py", *best, "validate.every_steps=2"]
    whole = launch(*words, "--runs", "whole", cwd=tmp_path)
    assert whole.code == 0, whole.text
    for ranks, epochs in ((1, 1), (2, 2), (0, 3)):
        assert launch(*words, f"max_epochs={epochs}", ranks=ranks, cwd=tmp_path).code == 0
    results = []
    for runs in ("whole", "runs"):
        folder = tmp_path / runs / "small"
        assert committed(folder / "checkpoints") == ["step-00000015", "step-00000012", "step-00000002"]
        results.append(json.loads((folder / "result.json").read_text()))
    assert results[0]["best"] == results[1]["best"]
    assert (results[0]["best"]["monitor"], results[0]["best"]["checkpoint"]) == ("loss", "step-00000002")
    curves = (tmp_path / "whole" / "small" / "metrics" / "valid.jsonl").read_text().splitlines()
    assert results[0]["best"]["value"] == max(json.loads(line)["loss"] for line in curves)
    assert f"at step 2, kept in {Path('whole', 'small', 'checkpoints', 'step-00000002')}" in whole.out


def test_a_target_may_be_set_and_removed_between_launches(tmp_path: Path) -> None:
    target = f"checkpoint.target={tmp_path / 'kept'}"
    assert train(tmp_path, steps=2).codes == [0]
    ended = train(tmp_path, target, steps=4)
    assert "resuming from step 2" in ended.output
    assert [entry.step for entry in survey(tmp_path / "kept" / "soak")] == [4, 3]
    ended = train(tmp_path, steps=6)
    assert "resuming from step 4" in ended.output
    assert steps(tmp_path) == [5, 6]
    assert "completed" in train(tmp_path, target, steps=6).output
