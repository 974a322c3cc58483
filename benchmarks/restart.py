"""Measures the time from a killed worker until a run trains again, beside bare scripts.

SIGKILL ends one rank. The time is from the kill until rank 0 has completed its first collective or step afterwards.
These take turns:

- `import torch`: a script under torchrun that only imports torch, joins a process group and makes one collective;
- `bare DDP step`: such a script with DistributedDataParallel, an optimizer and one step, and nothing else;
- `torchrun -m`: a run of disttrain under the same torchrun, which also loads its checkpoint;
- `launch --ranks`: the same run, started by `disttrain launch --ranks`, whose ranks need not import torch.

    python benchmarks/restart.py [--ranks 2] [--rounds 3] [--json FILE]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

BARE = """
import os, pathlib, signal, time
import torch
import torch.distributed as dist
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
dist.init_process_group("gloo")
{work}
if first and dist.get_rank() == 1:
    pathlib.Path("killed").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)
if first:
    time.sleep(60)
if dist.get_rank() == 0:
    pathlib.Path("again").write_text(str(time.time()))
dist.destroy_process_group()
"""
COLLECTIVE = "dist.all_reduce(torch.ones(1))"
STEP = """
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.nn.functional.mse_loss(model(torch.randn(8, 32)), torch.randn(8, 1)).backward()
optimizer.step()
"""
OURS = """
import os, pathlib, signal, time
from functools import partial
import torch
from torch import nn
from torch.utils.data import TensorDataset
from disttrain import Config
from disttrain.engine import Events
def data():
    return TensorDataset(torch.randn(64, 32), torch.randn(64, 1))
def watch(trainer, run):
    def step():
        if run.backend.restarts == 0 and run.backend.rank == 1 and trainer.state.iteration == 5:
            pathlib.Path("killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        if run.backend.restarts == 1 and run.backend.rank == 0 and not pathlib.Path("again").exists():
            pathlib.Path("again").write_text(str(time.time()))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, step)
config = Config(
    name="restart", model=partial(nn.Linear, 32, 1), train_data=data, loss=nn.MSELoss(), handlers=[watch],
    optimizer=partial(torch.optim.SGD, lr=0.1), global_batch_size=8, max_steps=6, checkpoint={"every_steps": 2},
    log={"tensorboard": False},
)
"""


def commands(ranks: int) -> dict[str, tuple[str, list[str]]]:
    """Return the script and the command of each contender, by its name."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    torchrun += ["--max-restarts", "1", "--monitor-interval", "0.2"]
    launch = [sys.executable, "-m", "disttrain", "launch", "--ranks", str(ranks)]
    return {
        "import torch": (BARE.format(work=COLLECTIVE), torchrun),
        "bare DDP step": (BARE.format(work=STEP), torchrun),
        "torchrun -m": (OURS, [*torchrun, "-m", "disttrain.launch"]),
        "launch --ranks": (OURS, launch),
    }


def restart_s(command: Sequence[str], folder: Path) -> float:
    """Return the seconds from the kill until the script trains again."""
    # The agent's store outlives its ranks; without this variable a bare script fails in the second attempt.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        [*command, "script.py"], cwd=folder, env=environment, check=False, capture_output=True, text=True, timeout=300
    )
    if not (folder / "again").exists():  # the exit code does not count: a bare script sometimes fails at its end
        raise RuntimeError(f"{' '.join(command)} did not train again:\n{done.stderr}")
    return float((folder / "again").read_text()) - float((folder / "killed").read_text())


def main() -> None:
    """Measure the contenders in turns, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in commands(options.ranks)}
    for _ in range(options.rounds):
        for name, (text, command) in commands(options.ranks).items():
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "script.py").write_text(text)
                times[name].append(restart_s(command, Path(folder)))
    bare = statistics.median(times["import torch"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        difference = f"{median - bare:+6.2f} s" if name != "import torch" else " " * 8
        print(f"{name:<15} {median:6.2f} s {difference}   ({', '.join(f'{s:.2f}' for s in seconds)})", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"ranks": options.ranks, "seconds": times}, indent=2) + "\n")


if __name__ == "__main__":
    main()
