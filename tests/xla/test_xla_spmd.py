"""XLA's SPMD mode on four devices of its CPU device: launched, killed, resumed, and resumed on another backend.

A process that has entered this mode stays in it, so every test here runs processes of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "integration"))
import commands
from commands import Done, checkpoints, lines, result, write_cfg

from disttrain.backend.xla_spmd import connect_spmd
from disttrain.environment import Launch, Topology
from disttrain.errors import BackendError

# Nothing random in the model: XLA draws other numbers than the CPU. A file makes the handler kill the run. The handler
# also writes the shapes of the parts of parameters and optimizer states on each device.
PLAIN = """
def net():
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
fields.update(
    model=net, max_epochs=None, max_steps=20, num_slots=2, grad_clip_norm=1.0, checkpoint={"every_steps": 10},
    schedule=lambda optimizer, total_steps: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 20),
)

import json, os, signal
from pathlib import Path
from disttrain.engine import Events

def parts_of(run):
    import torch_xla
    torch_xla.sync(wait=True)
    def shapes(tensor):
        return [list(part.shape) for part, _ in torch_xla._XLAC._get_local_shards([tensor])[0]]
    return {
        name: [shapes(parameter), shapes(run.optimizer.state[parameter]["exp_avg"])]
        for name, parameter in run.model.named_parameters()
    }

def prepare(trainer, run):
    if Path("kill").exists():
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=13), lambda: os.kill(os.getpid(), signal.SIGKILL))
    if run.backend.num_devices > 1:
        write = (run.directory.path / "parts.json").write_text
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=20), lambda: write(json.dumps(parts_of(run))))
fields.update(handlers=[prepare])
"""
pytestmark = pytest.mark.timeout(400)  # the first test waits for four launches
SPMD = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}


@pytest.fixture(autouse=True, scope="module")
def _four_devices() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SPMD.items():
            patch.setenv(name, value)
        yield


def launch(folder: Path, *words: object, ranks: int = 0) -> Done:
    done = commands.launch(folder / "cfg.py", *words, ranks=ranks, cwd=folder)
    assert done.code == 0, done.text
    return done


def losses(run: Path) -> torch.Tensor:
    """Return each step's training loss from the ledger."""
    steps = [line for line in lines(run / "ledger.jsonl") if line["step"] > 0]
    assert [line["step"] for line in steps] == list(range(1, 21))
    return torch.tensor([float.fromhex(line["loss"]) for line in steps], dtype=torch.float64)


def halfway(runs: Path, name: str, copy: str) -> None:
    """Copy a run in its state at the checkpoint of step 10."""
    shutil.copytree(runs / name, runs / copy)
    (runs / copy / "result.json").unlink(missing_ok=True)
    shutil.rmtree(runs / copy / "checkpoints" / "step-00000020", ignore_errors=True)
    assert checkpoints(runs / copy) == [10]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one config: on gloo, on four devices with whole and with cut parameters, and cut but killed."""
    folder = tmp_path_factory.mktemp("spmd")
    write_cfg(folder, PLAIN)
    launch(folder, "backend=gloo", "name=gloo")
    launch(folder, "backend=xla", "spmd=true", "name=whole")
    launch(folder, "backend=xla", "strategy=fsdp", "name=cut")
    (folder / "kill").touch()
    killed = commands.launch(folder / "cfg.py", "backend=xla", "strategy=fsdp", "name=killed", cwd=folder)
    (folder / "kill").unlink()
    assert killed.code == -9, killed.text
    return folder / "runs"


def test_losses_agree_with_gloo(runs: Path) -> None:
    on_gloo, whole, cut = (losses(runs / name) for name in ("gloo", "whole", "cut"))
    assert on_gloo[-1] < on_gloo[0]
    torch.testing.assert_close(whole, on_gloo, rtol=0, atol=1e-5)
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-5)


def test_a_steady_run_compiles_nothing_and_falls_back_nowhere(runs: Path) -> None:
    for name in ("whole", "cut"):
        facts = result(runs / name)
        assert facts["xla_compilations"] > 0
        assert (facts["xla_compilations_after_step_2"], facts["xla_fallback_ops"]) == (0, [])
        assert facts["world_size"] == 1


def test_devices_hold_parameters_whole_or_each_a_quarter(runs: Path) -> None:
    whole, cut = (json.loads((runs / name / "parts.json").read_text()) for name in ("whole", "cut"))
    assert whole["0.weight"] == [[[32, 64]] * 4] * 2
    assert cut["0.weight"] == [[[32, 16]] * 4] * 2  # the parameter, the optimizer's state
    assert cut["0.bias"] == [[[8]] * 4] * 2
    assert cut["3.weight"] == [[[10, 8]] * 4] * 2
    assert cut["3.bias"] == [[[10]] * 4] * 2  # four devices do not divide ten numbers


def test_a_killed_run_goes_on_with_the_same_bits_and_parts(runs: Path) -> None:
    halfway(runs, "killed", "resumed")
    done = launch(runs.parent, "backend=xla", "strategy=fsdp", "name=resumed")
    assert "resuming from step 10" in done.out
    assert "WARNING" not in done.out
    resumed, cut = runs / "resumed", runs / "cut"
    assert (resumed / "ledger.jsonl").read_text() == (cut / "ledger.jsonl").read_text()
    assert result(resumed)["params_sha256"] == result(cut)["params_sha256"]
    assert result(resumed)["xla_compilations_after_step_2"] == 0
    assert (resumed / "parts.json").read_text() == (cut / "parts.json").read_text()


def test_a_checkpoint_of_cut_parameters_goes_on_on_gloo(runs: Path) -> None:
    halfway(runs, "killed", "to-gloo")
    done = launch(runs.parent, "backend=gloo", "name=to-gloo")
    assert "resuming from step 10" in done.out
    torch.testing.assert_close(losses(runs / "to-gloo"), losses(runs / "gloo"), rtol=0, atol=1e-5)


def test_a_checkpoint_of_gloo_goes_on_on_two_devices_with_a_warning(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPU_NUM_DEVICES", "2")
    halfway(runs, "gloo", "from-gloo")
    done = launch(runs.parent, "backend=xla", "strategy=fsdp", "name=from-gloo")
    assert "resuming from step 10" in done.out
    assert "WARNING: the same bits are not promised" in done.out
    (warning,) = [line for line in done.out.splitlines() if "one kind of kernels" in line]
    assert "on xla CPU" in warning
    assert warning.endswith("2 devices as one (fsdp)")
    parts = json.loads((runs / "from-gloo" / "parts.json").read_text())
    assert parts["0.weight"] == [[[32, 32]] * 2] * 2
    torch.testing.assert_close(losses(runs / "from-gloo"), losses(runs / "gloo"), rtol=0, atol=1e-5)


def test_two_processes_on_the_cpu_device_are_refused() -> None:
    launched = Launch("torchrun", Topology(0, 2, 0, 2), "localhost", 29500)
    refusal = (
        r"expected one process, which drives all XLA devices .* got 2 from torchrun \(PJRT_DEVICE=CPU\); start python"
    )
    with pytest.raises(BackendError, match=refusal):
        connect_spmd(launched)


# Prints the refusals, and then the shapes of the parts on the devices, as JSON.
IN_SPMD_MODE = """
import json, os, re, sys
from pathlib import Path
import torch
from torch import nn
from disttrain.commands import launch
from disttrain.backend import connect
from disttrain.errors import DisttrainError
from disttrain.parallel.spmd_layout import SpmdLayout

facts = {}
facts["launch"] = launch.main([sys.argv[1], "backend=xla", "spmd=true", "num_slots=4"])
with connect("xla", spmd=True) as backend:
    facts["world"] = [backend.world_size, backend.num_devices]

def refused(function):
    try:
        function()
    except DisttrainError as error:
        return str(error)

facts["another mode"] = refused(lambda: connect("xla"))
import torch_xla
def parts(tensor):
    torch_xla.sync(wait=True)
    return [list(part.shape) for part, _ in torch_xla._XLAC._get_local_shards([tensor])[0]]

class Seq(nn.Module):
    # The output has the time first, with as many steps as there are devices.
    def __init__(self):
        super().__init__()
        self.rows = nn.Linear(8, 8)
    def forward(self, x):
        return self.rows(x.transpose(0, 1))

torch.manual_seed(0)
model = Seq()
x, mask = torch.randn(8, 4, 8), torch.ones(4, 4)
expected = model(x).detach()
on_device = model.to("xla")
spread = SpmdLayout(on_device, 4, shards=True)
batch = spread.cut({"x": x.to("xla"), "rest": [mask.to("xla"), "text"]})
facts["batch"] = [parts(batch["x"]), parts(batch["rest"][0])]
y = spread.bring_together((on_device(batch["x"]),))[0]
facts["output"] = parts(y)
facts["is close"] = bool(torch.allclose(y.cpu(), expected, atol=1e-6))
weight = on_device.rows.weight
whole = spread.whole(weight)
facts["whole"] = [str(whole.device), bool(torch.equal(whole, weight.cpu())), parts(weight)]
linear = nn.Linear(16, 24).to("xla")
spread = SpmdLayout(linear, 4, shards=True)
rows = spread.cut(torch.randn(8, 16).to("xla"))
torch_xla.sync(wait=True)
linear(rows).square().sum().backward()
facts["gradient"] = parts(linear.weight.grad)
def shapes(form):
    programs = list(Path(os.environ["PROGRAMS"]).glob("*after_optimizations.txt"))
    found = set(re.findall(form, "".join(path.read_text() for path in programs)))
    for path in programs:
        path.unlink()
    return sorted(found)
facts["gathered"] = shapes(r"= (\\w+\\[[\\d,]*\\])\\S* all-gather\\(")
held = spread.stateful(linear)
saved = {name: value + 1 for name, value in held.state_dict().items()}
held.load_state_dict(saved)
facts["loaded"] = [bool(torch.equal(held.state_dict()["weight"], saved["weight"])), parts(linear.weight)]
facts["load programs"] = shapes(r"f32\\[[\\d,]+\\]")
facts["last batch"] = parts(spread.cut(torch.randn(6, 8).to("xla")))
facts["laid out twice"] = refused(lambda: SpmdLayout(on_device, 4, shards=False))
print(json.dumps(facts))
"""


def test_where_tensors_lie_and_what_is_refused(tmp_path: Path) -> None:
    cfg = write_cfg(tmp_path, PLAIN)
    program = [sys.executable, "-c", IN_SPMD_MODE, str(cfg)]
    programs = tmp_path / "programs"
    flags = f"--xla_dump_to={programs} --xla_dump_hlo_as_text"
    env = {**os.environ, "XLA_FLAGS": flags, "PROGRAMS": str(programs)}
    done = subprocess.run(program, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["launch"] == 2
    assert "makes slots of 10 samples, which cannot be cut over 4 devices equally" in done.stderr
    assert not (tmp_path / "runs").exists()
    assert facts["world"] == [1, 4]
    assert "got one in SPMD mode, which a process cannot leave" in facts["another mode"]
    assert facts["batch"] == [[[2, 4, 8]] * 4, [[4, 4]] * 4]
    assert facts["output"] == [[4, 8, 8]] * 4
    assert facts["is close"]
    assert facts["whole"] == ["cpu", True, [[2, 8]] * 4]
    assert facts["gradient"] == [[6, 16]] * 4
    gathered = set(facts["gathered"])
    assert gathered & {
        "f32[24,16]",
        "f32[16,24]",
    }  # the linear layer's weight, and neither its input nor its output
    assert not gathered & {"f32[8,16]", "f32[8,24]", "f32[16,8]", "f32[24,8]"}
    assert facts["loaded"] == [True, [[6, 16]] * 4]
    assert "f32[6,16]" in facts["load programs"]
    assert "f32[24,16]" not in facts["load programs"]  # no device has held more than its part
    assert facts["last batch"] == [[6, 8]] * 4
    assert "got the parameter rows.weight annotated with" in facts["laid out twice"]
