"""The main job by its real commands: train, kill, resume on other ranks, finish, begin a new run."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import (
    DIGITS,
    Done,
    checkpoints,
    environment,
    kill,
    launch,
    launch_as_typed,
    lines,
    result,
    start,
    write_cfg,
)
from safetensors.torch import load_file

slow = pytest.mark.slow

STEPS = 15  # of the small config: 3 epochs of 200 // 40 steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run of the small config, in one process."""
    folder = tmp_path_factory.mktemp("whole")
    write_cfg(folder)
    done = launch("cfg.py", cwd=folder)
    assert done.code == 0, done.text
    return folder


def same_as(whole: Path, folder: Path) -> None:
    """Check that the run in `folder` has the weights, metrics and curves of the uninterrupted one."""
    expected, got = result(whole / "runs" / "small"), result(folder / "runs" / "small")
    assert got["status"] == "completed"
    for field in ("step", "epoch", "params_sha256", "metrics", "num_slots"):
        assert got[field] == expected[field], field
    for curve in ("train.jsonl", "valid.jsonl"):
        assert lines(folder / "runs/small/metrics" / curve) == lines(whole / "runs/small/metrics" / curve), curve
    assert (folder / "runs/small/ledger.jsonl").read_text() == (whole / "runs/small/ledger.jsonl").read_text()


def test_a_run_directory_holds_the_files_that_the_readme_names(whole: Path) -> None:
    run = whole / "runs" / "small"
    files = {str(path.relative_to(run)) for path in run.rglob("*")}
    assert {
        "config.json",
        "cfg.py",
        "overrides.json",
        "result.json",
        "checkpoints/step-00000015/MANIFEST.json",
        "ledger.jsonl",
        "metrics/train.jsonl",
        "metrics/valid.jsonl",
        "logs/rank-0.log",
    } <= files
    assert checkpoints(run) == [5, 10, 15]
    assert [line["step"] for line in lines(run / "metrics/train.jsonl")] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines(run / "metrics/valid.jsonl")] == [5, 10, 15]
    assert [line["step"] for line in lines(run / "ledger.jsonl")] == list(range(STEPS + 1))
    ended = result(run)
    assert ended["status"] == "completed"
    assert (ended["step"], ended["epoch"], ended["world_size"], ended["num_slots"]) == (15, 3, 1, 4)
    assert {
        "metrics",
        "params_sha256",
        "samples_per_second",
        "wall_s",
        "disttrain",
        "torch",
        "python",
        "device",
    } <= set(ended)


def test_params_sha256_is_that_of_the_saved_weights(whole: Path) -> None:
    import hashlib

    run = whole / "runs" / "small"
    tensors = load_file(run / "checkpoints/step-00000015/tensors.safetensors")
    model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    assert len(model) == 9  # two linear layers, one BatchNorm with its three buffers
    from disttrain.config import load_config
    from disttrain.evidence import params_sha256

    net = load_config(whole / "cfg.py").model()
    net.load_state_dict(model)
    assert params_sha256(net) == result(run)["params_sha256"]
    assert len(result(run)["params_sha256"]) == hashlib.sha256().digest_size * 2


@slow  # two ranks, one of which dies, are in test_torchrun_restarts_a_rank_that_dies
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_number_of_ranks_gives_the_same_bits(whole: Path, tmp_path: Path, ranks: int) -> None:
    write_cfg(tmp_path)
    done = launch_as_typed("cfg.py", ranks=ranks, cwd=tmp_path)
    assert done.code == 0, done.text
    assert result(tmp_path / "runs" / "small")["world_size"] == ranks
    assert sorted(p.name for p in (tmp_path / "runs/small/logs").iterdir()) == [f"rank-{r}.log" for r in range(ranks)]
    same_as(whole, tmp_path)


# A rank that dies by SIGKILL at a step of the run's first life, as by the out-of-memory killer.
DIES = """
import os, signal, pathlib
from disttrain.engine import Events
STEP, RANK = {step}, {rank}
def dies(trainer, run):
    mark = pathlib.Path("died")
    def die():
        if run.backend.rank == RANK and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    trainer.add_event_handler(Events.{event}(once=STEP), die)
fields["handlers"] = [dies]
"""


@pytest.mark.parametrize(
    ("ranks", "workers"), [pytest.param(0, 0, marks=slow), (0, 2), *(pytest.param(2, w, marks=slow) for w in (0, 2))]
)
def test_killed_at_a_random_step_and_started_again(whole: Path, tmp_path: Path, ranks: int, workers: int) -> None:
    step = random.SystemRandom().randint(1, STEPS)
    print("killed at step", step)  # shown when the test fails
    write_cfg(tmp_path, DIES.format(step=step, rank=max(ranks - 1, 0), event="ITERATION_COMPLETED"))
    words = ("cfg.py", f"num_workers={workers}", "checkpoint.every_steps=2")
    killed = launch(*words, ranks=ranks, cwd=tmp_path)
    assert killed.code != 0
    assert (tmp_path / "died").exists()
    done = launch(*words, ranks=ranks, cwd=tmp_path)
    assert done.code == 0, done.text
    assert ("resuming from step" in done.out) == (step > 2)
    same_as(whole, tmp_path)


@pytest.mark.slow
def test_killed_from_outside_at_a_random_moment(whole: Path, tmp_path: Path) -> None:
    write_cfg(tmp_path, "fields['num_workers'] = 2")
    for _ in range(2):
        process = start("cfg.py", "checkpoint.every_steps=1", ranks=2, cwd=tmp_path)
        time.sleep(random.SystemRandom().uniform(3, 9))
        kill(process)
    done = launch("cfg.py", "checkpoint.every_steps=1", ranks=2, cwd=tmp_path)
    assert done.code == 0, done.text
    same_as(whole, tmp_path)


@slow
def test_resumed_on_another_number_of_ranks_and_workers(whole: Path, tmp_path: Path) -> None:
    write_cfg(tmp_path, DIES.format(step=8, rank=0, event="ITERATION_STARTED"))
    assert launch("cfg.py", "num_workers=1", ranks=3, cwd=tmp_path).code != 0
    done = launch("cfg.py", ranks=2, cwd=tmp_path)
    assert done.code == 0, done.text
    assert "resuming from step 5" in done.out
    same_as(whole, tmp_path)


@pytest.mark.slow
def test_torchrun_restarts_a_rank_that_dies(whole: Path, tmp_path: Path) -> None:
    write_cfg(tmp_path, DIES.format(step=7, rank=1, event="ITERATION_COMPLETED"))
    done = launch_as_typed("cfg.py", "--fresh", ranks=2, cwd=tmp_path, torchrun=("--max-restarts", "3"))
    assert done.code == 0, done.text
    assert "resuming from step 5" in done.out
    assert not (tmp_path / "runs" / "small.1").exists()
    same_as(whole, tmp_path)


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        pytest.param(signal.SIGTERM, 2, marks=slow),  # test_signals.py has it in every phase
        (signal.SIGINT, 0),
        pytest.param(signal.SIGTERM, 0, marks=slow),
        pytest.param(signal.SIGINT, 2, marks=slow),
    ],
)
def test_a_signal_saves_and_stops_at_the_next_step(
    whole: Path, tmp_path: Path, ranks: int, number: signal.Signals
) -> None:
    change = f"""
    import os, time
    from disttrain.engine import Events
    def send_signal(trainer, run):
        def send():
            if run.backend.rank == 0 and not os.path.exists("sent"):
                open("sent", "w").close()
                os.kill(os.getpid(), {int(number)})
                time.sleep(1)  # steps take a millisecond, and a thread has to receive the signal
        trainer.add_event_handler(Events.ITERATION_STARTED(once=7), send)
    fields["handlers"] = [send_signal]
    """
    write_cfg(tmp_path, change)
    stopped = launch("cfg.py", ranks=ranks, cwd=tmp_path)
    ended = result(tmp_path / "runs" / "small")
    assert stopped.code == (75 if ranks == 0 else 1), stopped.text
    assert "Traceback" not in stopped.rank_output()
    assert ended["status"] == "interrupted"
    assert 7 <= ended["step"] <= 8
    assert checkpoints(tmp_path / "runs" / "small")[-1] == ended["step"]
    done = launch("cfg.py", ranks=ranks, cwd=tmp_path)
    assert done.code == 0, done.text
    assert f"resuming from step {ended['step']}" in done.out
    same_as(whole, tmp_path)


class TestFinished:
    @pytest.fixture
    def folder(self, whole: Path, tmp_path: Path) -> Path:
        shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
        return tmp_path

    def test_a_launch_says_that_it_is_completed_and_prints_the_result(self, folder: Path) -> None:
        before = (folder / "runs/small/result.json").read_bytes()
        for words in (["cfg.py"], ["runs/small"]):
            done = launch(*words, cwd=folder)
            assert done.code == 0, done.text
            assert "is completed" in done.out
            assert result(folder / "runs/small")["params_sha256"] in done.out
        assert (folder / "runs/small/result.json").read_bytes() == before

    def test_fresh_begins_a_new_run_and_keeps_the_old_one(self, whole: Path, folder: Path) -> None:
        before = (folder / "runs/small/result.json").read_bytes()
        done = launch("cfg.py", "--fresh", cwd=folder)
        assert done.code == 0, done.text
        assert (folder / "runs/small.1/result.json").read_bytes() == before
        assert "small.1" in done.out
        same_as(whole, folder)

    def test_goes_on_with_more_epochs(self, folder: Path) -> None:
        done = launch("cfg.py", "max_epochs=4", cwd=folder)
        assert done.code == 0, done.text
        assert "resuming from step 15" in done.out
        assert result(folder / "runs/small")["step"] == 20

    def test_goes_on_to_a_number_of_steps(self, folder: Path) -> None:
        done = launch("cfg.py", "max_epochs=none", "max_steps=18", cwd=folder)
        assert done.code == 0, done.text
        assert result(folder / "runs/small")["step"] == 18
        assert checkpoints(folder / "runs/small")[-1] == 18
        short = launch("cfg.py", "max_epochs=1", cwd=folder)
        assert short.code == 0, short.text  # completed is completed
        (folder / "runs/small/result.json").unlink()
        refused = launch("cfg.py", "max_epochs=1", cwd=folder)
        assert refused.code == 2
        assert "stands at step 18, beyond the 5 steps" in refused.err

    def test_other_data_is_refused_unless_it_is_accepted(self, folder: Path) -> None:
        write_cfg(folder, "fields['train_data'] = lambda: torch.utils.data.Subset(Noisy(), range(160))")
        # The factory has another name, so the config is another one and is refused.
        refused = launch("cfg.py", "max_epochs=5", cwd=folder)
        assert refused.code == 2
        assert "train_data" in refused.err
        write_cfg(folder, "Noisy.__len__ = lambda self: 160")
        refused = launch("cfg.py", "max_epochs=5", cwd=folder)
        assert refused.code == 2
        assert "'dataset_length': 200" in refused.err
        assert "'dataset_length': 160" in refused.err
        accepted = launch("cfg.py", "max_epochs=5", "accept_other_data=true", cwd=folder)
        assert accepted.code == 0, accepted.text
        assert result(folder / "runs/small")["step"] == 20

    def test_killed_before_its_result_was_written(self, whole: Path, folder: Path) -> None:
        (folder / "runs/small/result.json").unlink()
        done = launch("cfg.py", cwd=folder)
        assert done.code == 0, done.text
        same_as(whole, folder)


def test_a_run_directory_is_resumed_by_its_name(whole: Path, tmp_path: Path) -> None:
    write_cfg(tmp_path, DIES.format(step=8, rank=0, event="ITERATION_STARTED"))
    assert launch("cfg.py", "log.every_steps=3", cwd=tmp_path).code != 0
    (tmp_path / "cfg.py").unlink()
    done = launch("runs/small", cwd=tmp_path)
    assert done.code == 0, done.text
    assert "resuming from step 5" in done.out
    same_as(whole, tmp_path)


@slow
def test_overrides_of_the_issue_run_on_the_example(tmp_path: Path) -> None:
    words = (DIGITS, "max_epochs=2", "optimizer.lr=3e-3", "global_batch_size=96")
    one = launch(*words, cwd=tmp_path)
    assert one.code == 0, one.text
    three = launch(*words, "--runs", "other", ranks=3, cwd=tmp_path)
    assert three.code == 0, three.text
    first, second = result(tmp_path / "runs/digits"), result(tmp_path / "other/digits")
    assert first["params_sha256"] == second["params_sha256"]
    assert first["metrics"] == second["metrics"]
    assert first["step"] == 2 * (1437 // 96)


def test_print_config_and_check_start_nothing(tmp_path: Path) -> None:
    write_cfg(tmp_path)
    printed = launch("cfg.py", "--print-config", "optimizer.lr=0.25", cwd=tmp_path)
    assert printed.code == 0, printed.text
    assert '"optimizer.lr": 0.25' in printed.out
    checked = launch("cfg.py", "--check", cwd=tmp_path)
    assert checked.code == 0
    assert "in order" in checked.out
    assert not (tmp_path / "runs").exists()


def test_help_lists_every_field() -> None:
    from disttrain.config import field_table

    done = subprocess.run(
        [sys.executable, "-m", "disttrain.launch", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    rows = field_table()
    assert len(rows) > 25
    for row in rows:
        assert row.name in done.stdout
    assert "exit codes" in done.stdout


def test_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    write_cfg(tmp_path)
    done = launch("cfg.py", "log.every_s=0.001", "log.every_steps=1", cwd=tmp_path)
    assert done.code == 0
    shown: Done = done
    line = next(text for text in shown.out.splitlines() if "step 3/15" in text)
    assert "loss" in line
    assert "samples/s" in line
    assert "left" in line
    assert "\x1b" not in shown.out
