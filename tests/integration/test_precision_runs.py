"""Runs in other precisions than float32, by the real command: the same bits killed, resumed and on other ranks.

apex is the double of tests/precision/doubles; the cfg.py allows it on a CPU.
"""

import math
import os
import sys
from pathlib import Path

import pytest
import torch
from commands import checkpoints, launch, lines, result, write_cfg
from ranks import Ranks

from disttrain.backend import Backend
from disttrain.checkpoint import load
from disttrain.commands.launch import COMPLETED, FAILED, main
from disttrain.devices import DEVICE_TYPES

DOUBLE = Path(__file__).parents[1] / "precision" / "doubles" / "apex_with_amp"
EXAMPLES = Path(__file__).parents[2] / "examples"
ON_CPUS = "backend=gloo"  # otherwise a machine with a GPU would use it for one rank, and a GPU gives other bits
OVERFLOW_AT, DIES_AT = 7, 9  # 5 steps per epoch, 15 in all

# The gradients of one step overflow in the backward, on every slot; the loss stays the same. Buffers are the same for
# every slot of a step, so the buffer counts the steps on any number of ranks.
OVERFLOWS = f"""
from torch import nn
import torch
class Overflows(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
    def forward(self, x):
        y = self.body(x)
        if self.training:
            self.steps += 1
            if int(self.steps) == {OVERFLOW_AT}:
                y.register_hook(lambda gradient: gradient * torch.inf)
        return y

import os, signal
from disttrain.engine import Events
def dies(trainer, run):
    def die():
        if run.backend.rank == 0 and os.path.exists("die"):
            os.rename("die", "died")
            if os.path.getsize("died"):
                raise RuntimeError("rank 0 dies")
            os.kill(os.getpid(), signal.SIGKILL)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once={DIES_AT}), die)

if "fields" in globals(): fields.update(
    model=Overflows,
    schedule=lambda optimizer, total: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=total),
    grad_clip_norm=1.0,
    handlers=[dies],
)
"""
APEX = f"""
import sys
sys.path.insert(0, {str(DOUBLE)!r})
import dataclasses
from disttrain.devices import DEVICE_TYPES as rows
rows["cpu"] = dataclasses.replace(rows["cpu"], precisions=(*rows["cpu"].precisions, "apex"))
"""


def run(folder: Path, *words: str, ranks: int = 0, change: str = "", dies: bool = False) -> Path:
    """Run the small config with `change` in `folder` by the command; return its run directory."""
    folder.mkdir(exist_ok=True)
    write_cfg(folder, change)
    if dies:
        (folder / "die").touch()
    done = launch("cfg.py", ON_CPUS, *words, ranks=ranks, cwd=folder)
    assert (done.code != 0) == dies, done.text
    return folder / "runs" / "small"


def command(backend: Backend, folder: str, words: list[str]) -> int:
    """Run the command on a rank of the pool, and remove apex from its modules afterwards."""
    backend.close()
    rows = dict(DEVICE_TYPES)
    os.chdir(folder)
    try:
        return main(["cfg.py", ON_CPUS, *words])
    finally:
        DEVICE_TYPES.update(rows)
        for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
            del sys.modules[name]


def run_in(
    ranks: Ranks,
    world_size: int,
    folder: Path,
    *words: str,
    change: str = "",
    dies: bool = False,
    code: str | None = None,
) -> Path:
    """Run it like `run`, on ranks of the pool, which need no start; there it dies by an exception."""
    folder.mkdir(exist_ok=True)
    if code is None:
        write_cfg(folder, change)
    else:
        (folder / "cfg.py").write_text(code)
    if dies:
        (folder / "die").write_text("raise")
    assert ranks(world_size, command, str(folder), list(words)) == [FAILED if dies else COMPLETED] * world_size
    return folder / "runs" / "small"


def loss_scale(run: Path) -> float:
    newest = run / "checkpoints" / f"step-{checkpoints(run)[-1]:08d}"
    state = load(newest).state["precision"]
    return state["scaler"]["scale"] if "scaler" in state else state["loss_scaler0"]["loss_scale"]


def same(one: Path, other: Path) -> None:
    for field in ("step", "params_sha256", "metrics", "skipped_steps"):
        assert result(one)[field] == result(other)[field], field
    assert lines(one / "metrics/train.jsonl") == lines(other / "metrics/train.jsonl")


CASES = [
    pytest.param(("precision=fp16",), "", id="fp16"),
    pytest.param(("precision=fp16", "optimizer.fused=true"), "", id="fp16-fused"),
    pytest.param(("precision=fp16", "on_nan=skip"), "", id="fp16-skip"),
    pytest.param(("precision=apex",), APEX, id="apex"),
    pytest.param(("precision=apex", "on_nan=skip"), APEX, id="apex-skip"),
]


def check_whole(whole: Path) -> None:
    ended = result(whole)
    assert (ended["status"], ended["skipped_steps"], loss_scale(whole)) == ("completed", 1, 2.0**15)
    # The learning rate of each step: from a third to the whole in 15 steps; the skipped step does not count.
    stepped = [step - (step > OVERFLOW_AT) - 1 for step in range(1, 16)]
    rates = [line["learning_rate"] for line in lines(whole / "metrics/train.jsonl")]
    assert rates == [pytest.approx(1e-3 * (1 / 3 + 2 / 3 * done / 15)) for done in stepped]
    assert all(math.isfinite(line["loss"]) for line in lines(whole / "metrics/train.jsonl"))


@pytest.mark.parametrize(("words", "change"), CASES)
def test_an_overflow_skips_that_update_and_halves_the_scale_resumed_or_not(tmp_path, ranks, words, change):
    words, change = (*words, "checkpoint.every_steps=4"), OVERFLOWS + change
    whole = run_in(ranks, 1, tmp_path / "whole", *words, change=change)
    check_whole(whole)
    assert f"step {OVERFLOW_AT} is left out" in (whole / "logs" / "rank-0.log").read_text()
    stopped = run_in(ranks, 2, tmp_path / "stopped", *words, change=change, dies=True)
    assert (checkpoints(stopped)[-1], loss_scale(stopped)) == (8, 2.0**15)
    same(whole, run_in(ranks, 3, tmp_path / "stopped", *words, change=change))


@pytest.mark.slow
@pytest.mark.parametrize(("words", "change"), CASES)
def test_killed_for_good_and_started_again(tmp_path, words, change):
    words, change = (*words, "checkpoint.every_steps=4"), OVERFLOWS + change
    whole = run(tmp_path / "whole", *words, change=change)
    check_whole(whole)
    killed = run(tmp_path / "killed", *words, ranks=2, change=change, dies=True)
    assert (checkpoints(killed)[-1], loss_scale(killed)) == (8, 2.0**15)
    same(whole, run(tmp_path / "killed", *words, ranks=3, change=change))


@pytest.mark.parametrize("words", [("precision=bf16",), ("optimizer.fused=true",)])
def test_the_same_bits_on_one_rank_and_on_three(tmp_path, ranks, words):
    one = run_in(ranks, 1, tmp_path / "one", *words)
    same(one, run_in(ranks, 3, tmp_path / "three", *words))


def test_bf16_ends_near_fp32_and_is_not_it(tmp_path, ranks):
    full, half = run_in(ranks, 1, tmp_path / "fp32"), run_in(ranks, 1, tmp_path / "bf16", "precision=bf16")
    assert result(full)["params_sha256"] != result(half)["params_sha256"]
    assert result(half)["metrics"]["loss"] == pytest.approx(result(full)["metrics"]["loss"], rel=0.05)


FIFTH = f"""
sys.path.insert(0, {str(EXAMPLES)!r})
import bf16_weights, digits
from disttrain.config import replace
precision = bf16_weights.BF16Weights if NAME == "fifth" else NAME
config = replace(digits.config, name="small", precision=precision, max_epochs=None, max_steps=20, grad_clip_norm=0.5,
    handlers=[dies])
"""


def fifth(ranks: Ranks, world_size: int, folder: Path, name: str = "fifth", dies: bool = False) -> Path:
    """Run the example's digits for 20 steps in the example's precision, or in the one called `name`."""
    code = f"import sys\nNAME = {name!r}\n{OVERFLOWS}\n{FIFTH}"
    return run_in(ranks, world_size, folder, "checkpoint.every_steps=4", code=code, dies=dies)


def test_a_fifth_precision_is_one_file_and_keeps_the_promise(tmp_path, ranks):
    code = (EXAMPLES / "bf16_weights.py").read_text()
    assert len(code.splitlines()) < 60
    assert f"```python file=examples/bf16_weights.py\n{code}```" in (EXAMPLES.parent / "docs/precision.md").read_text()
    whole = fifth(ranks, 1, tmp_path / "whole")
    fifth(ranks, 3, tmp_path / "stopped", dies=True)
    assert checkpoints(tmp_path / "stopped/runs/small")[-1] == 8
    same(whole, fifth(ranks, 2, tmp_path / "stopped"))

    state = load(whole / "checkpoints/step-00000020").state
    matrices = [weight for weight in state["model"].values() if weight.ndim > 1]
    masters = state["precision"]["masters"]
    assert {weight.dtype for weight in matrices} == {torch.bfloat16}
    assert all(torch.equal(master.bfloat16(), w) for master, w in zip(masters, matrices, strict=True))
    assert not any(torch.equal(master, w.float()) for master, w in zip(masters, matrices, strict=True))

    full = fifth(ranks, 1, tmp_path / "fp32", "fp32")
    assert result(whole)["metrics"]["loss"] == pytest.approx(result(full)["metrics"]["loss"], rel=0.05)
    first = [lines(run / "metrics/train.jsonl")[0]["loss"] for run in (whole, full)]
    assert first[0] == pytest.approx(first[1], rel=0.01)


@pytest.mark.parametrize("precision", ["apex", "bf16"])
def test_apexs_optimizers_and_layers_are_factories_like_any_other(tmp_path, ranks, precision):
    change = f"""{APEX}
from apex.normalization import FusedRMSNorm
from apex.optimizers import FusedAdam
def fused_net():
    return nn.Sequential(nn.Linear(64, 32), FusedRMSNorm(32), nn.ReLU(), nn.Linear(32, 10))
fields.update(model=fused_net, optimizer=partial(FusedAdam, lr=1e-3))
"""
    words = (f"precision={precision}", "optimizer.weight_decay=0.01")
    one = run_in(ranks, 1, tmp_path / "one", *words, change=change)
    assert result(one)["precision"] == precision
    same(one, run_in(ranks, 3, tmp_path / "three", *words, change=change))


@pytest.mark.parametrize("value", ["true", "false"])
def test_tf32_has_the_value_of_the_config(tmp_path, ranks, value):
    change = """
    def write_settings(trainer, run):
        settings = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        open("settings", "w").write(str(settings))
    fields["handlers"] = [write_settings]
    """
    run_in(ranks, 1, tmp_path, f"tf32={value}", "max_epochs=1", change=change)
    assert (tmp_path / "settings").read_text() == str((value == "true",) * 2)


def test_an_object_that_is_no_precision_is_refused(tmp_path):
    message = refused(tmp_path, "fields['precision'] = lambda device: 'bf16'")
    assert "ConfigError: precision: expected a function that returns an object with prepare, forward" in message


def refused(tmp_path: Path, change: str, *words: str, ranks: int = 0) -> str:
    """Launch, check that no model was built and no run directory made, and return the output."""
    built = "fields['model'] = fields['train_data'] = lambda: print('BUILT')\n"
    write_cfg(tmp_path, built + change)
    done = launch("cfg.py", ON_CPUS, *words, ranks=ranks, cwd=tmp_path)
    assert done.code == (2 if ranks == 0 else 1), done.text
    assert "BUILT" not in done.text
    assert "Traceback" not in done.rank_output()
    assert not (tmp_path / "runs").exists()
    return done.text


def test_apex_on_a_cpu_names_the_precisions_that_work(tmp_path):
    expected = "ConfigError: precision='apex' does not work on a device of type 'cpu'; use fp32 or bf16 or fp16 or auto"
    assert expected in refused(tmp_path, "", "precision=apex")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param((), "found no package apex", marks=pytest.mark.slow),
        pytest.param(("lib.py",), "found another package of that name", marks=pytest.mark.slow),
        pytest.param(
            ("multi_tensor_apply/multi_tensor_apply.py", "optimizers/fused_adam.py"),
            "too new to have it",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_missing_apex_names_the_package_and_the_alternatives(tmp_path, files, expected):
    for file in ("__init__.py", *files) if files else ():
        path = tmp_path / "other" / "apex" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise ImportError('a check must not import it')")
    hidden = "sys.path[:] = [p for p in sys.path if not (pathlib.Path(p) / 'apex').exists()]\n"
    change = APEX.replace(str(DOUBLE), str(tmp_path / "other")) if files else APEX + "import pathlib\n" + hidden
    message = refused(tmp_path, change, "precision=apex", ranks=2 if not files else 0)
    assert expected in message
    assert "precision='apex': expected" in message
    assert 'in a config precision="bf16" or "fp16"' in message
