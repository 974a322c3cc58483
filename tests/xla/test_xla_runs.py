"""Real runs of the launcher on XLA's CPU device: parity with gloo, exact resume, checkpoints across backends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "integration"))
import commands
from commands import DIGITS, Done, checkpoints, lines, result, write_cfg

# Nothing random in the model: XLA draws other numbers than the CPU. Batch normalisation and a schedule stay in.
PLAIN = """
def net():
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
fields.update(
    model=net, max_epochs=None, max_steps=20, grad_clip_norm=1.0,
    schedule=lambda optimizer, total_steps: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 20),
)

import os, signal
from pathlib import Path
from disttrain.engine import Events
def leave_early(trainer, run):
    # A file makes the run stop in the middle, as by a signal.
    if Path("leave").exists() and run.backend.rank == 0:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=9), lambda: os.kill(os.getpid(), signal.SIGTERM))
fields.update(handlers=[leave_early])
"""


@pytest.fixture(autouse=True)
def _on_the_cpu_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PJRT_DEVICE", "CPU")


def launch(folder: Path, *words: object, ranks: int = 0) -> Done:
    done = commands.launch_as_typed(*words, ranks=ranks, cwd=folder)
    assert done.code == 0, done.text
    return done


def losses(run: Path) -> torch.Tensor:
    """Return each step's training loss from the ledger."""
    steps = [line for line in lines(run / "ledger.jsonl") if line["step"] > 0]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    return torch.tensor([float.fromhex(line["loss"]) for line in steps], dtype=torch.float64)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one config: on two gloo ranks, on xla, and on xla in bf16."""
    folder = tmp_path_factory.mktemp("plain")
    cfg = write_cfg(folder, PLAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PJRT_DEVICE", "CPU")
        launch(folder, cfg, "backend=gloo", "name=gloo", ranks=2)
        launch(folder, cfg, "backend=xla", "name=xla")
        launch(folder, cfg, "backend=xla", "name=bf16", "precision=bf16", "checkpoint.asynchronous=true")
    return folder


def test_fp32_on_xla_and_on_gloo_agree(plain: Path) -> None:
    on_gloo, on_xla = losses(plain / "runs" / "gloo"), losses(plain / "runs" / "xla")
    assert len(on_gloo) == len(on_xla) == 20
    assert on_gloo[-1] < on_gloo[0]
    torch.testing.assert_close(on_xla, on_gloo, rtol=0, atol=1e-5)


def test_bf16_is_within_its_tolerance_of_fp32(plain: Path) -> None:
    in_fp32, in_bf16 = losses(plain / "runs" / "xla"), losses(plain / "runs" / "bf16")
    assert not torch.equal(in_fp32, in_bf16)
    torch.testing.assert_close(in_bf16, in_fp32, rtol=2**-6, atol=2**-6)


def test_a_steady_run_compiles_nothing_and_reports_it(plain: Path) -> None:
    for name in ("xla", "bf16"):
        facts = result(plain / "runs" / name)
        assert facts["device"] == "xla:0"
        assert facts["xla_compilations"] > 0
        assert facts["xla_compilations_after_step_2"] == 0
        assert facts["xla_fallback_ops"] == []
    assert "xla_compilations" not in result(plain / "runs" / "gloo")


@pytest.mark.parametrize(("first", "then"), [("xla", "gloo"), ("gloo", "xla")])
def test_a_checkpoint_of_one_backend_goes_on_on_another(plain: Path, first: str, then: str) -> None:
    cfg, name = plain / "cfg.py", f"{first}-{then}"
    ranks = {"xla": 0, "gloo": 2}
    leave = plain / "leave"
    leave.touch()
    done = commands.launch_as_typed(cfg, f"backend={first}", f"name={name}", ranks=ranks[first], cwd=plain)
    leave.unlink()
    step = max(checkpoints(plain / "runs" / name))
    assert 9 <= step < 20, done.text
    done = launch(plain, cfg, f"backend={then}", f"name={name}", ranks=ranks[then])
    assert f"resuming from step {step}" in done.out
    facts = result(plain / "runs" / name)
    assert (facts["status"], facts["step"]) == ("completed", 20)
    torch.testing.assert_close(losses(plain / "runs" / name), losses(plain / "runs" / "gloo"), rtol=0, atol=1e-5)


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Kill a run with dropout, noise from three generators, workers and batch normalisation."""
    cfg = write_cfg(tmp_path, "fields.update(num_workers=1, max_epochs=6)")
    words = ("backend=xla", "checkpoint.every_steps=4", "ledger.every_steps=5")
    launch(tmp_path, cfg, *words, "name=whole")
    whole, cut = tmp_path / "runs" / "whole", tmp_path / "runs" / "cut"
    process = commands.start(cfg, *words, "name=cut", cwd=tmp_path)
    deadline = time.monotonic() + 100
    while not any(0 < step < 24 for step in checkpoints(cut)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    commands.kill(process)
    done = launch(tmp_path, cfg, *words, "name=cut")
    assert "resuming from step" in done.out
    assert (cut / "ledger.jsonl").read_text() == (whole / "ledger.jsonl").read_text()
    same = ("step", "params_sha256", "metrics")
    assert [result(cut)[key] for key in same] == [result(whole)[key] for key in same]


def test_the_example_falls_back_to_no_op_and_reports_its_programs(tmp_path: Path) -> None:
    done = launch(tmp_path, DIGITS, "backend=xla", "max_epochs=2")
    facts = result(tmp_path / "runs" / "digits")
    assert facts["xla_fallback_ops"] == []
    # Its schedule ends near 0. There AdamW's factor 1 - lr * weight_decay is 1 in float32, a constant of the program.
    assert facts["xla_compilations_after_step_2"] <= 1
    assert f"compiled             {facts['xla_compilations']} programs" in done.out


READS_THE_LOSS = """
from disttrain.engine import Events
def read(trainer, run):
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: engine.state.output[0].item())
fields.update(handlers=[read], max_epochs=1)
"""


def test_a_read_of_a_value_in_each_step_is_named_once(tmp_path: Path) -> None:
    cfg = write_cfg(tmp_path, READS_THE_LOSS)
    launch(tmp_path, cfg, "backend=xla")
    run = tmp_path / "runs" / "small"
    assert result(run)["xla_fallback_ops"] == ["aten::_local_scalar_dense"]
    log = (run / "logs" / "rank-0.log").read_text()
    assert log.count("aten::_local_scalar_dense is not compiled") == 1
    assert "a value was read from the device" in log


def test_two_processes_on_the_cpu_device_are_refused(tmp_path: Path) -> None:
    cfg = write_cfg(tmp_path)
    done = commands.launch_as_typed(cfg, "backend=xla", ranks=2, cwd=tmp_path)
    assert done.code != 0
    output = done.rank_output()
    assert (
        "BackendError: expected 2 replicas, as torchrun started, got 1 from the XLA runtime (PJRT_DEVICE=CPU)" in output
    )
    assert "each would train alone as rank 0 of 1; start one process (python -m disttrain.launch)" in output
    assert not (tmp_path / "runs").exists()


def test_a_signal_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    cfg = write_cfg(tmp_path, "fields.update(max_epochs=None, max_steps=400)")
    process = commands.start(cfg, "backend=xla", cwd=tmp_path)
    run = tmp_path / "runs" / "small"
    deadline = time.monotonic() + 100
    while not checkpoints(run):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert result(run)["status"] == "interrupted"
    assert max(checkpoints(run)) == result(run)["step"]


def test_importing_disttrain_does_not_import_torch_xla() -> None:
    program = "import sys, disttrain, disttrain.run.train, disttrain.commands.launch; print('torch_xla' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == "False\n"
