"""Random faults in an elastic run of three hosts: `python tests/soak/chaos.py [--minutes 20] [--seed 0]`; needs root.

The hosts are namespaces of this machine, joined by a bridge (hosts.py). On each host a shell restarts the script of
`launch/local` whenever it ends before the run has ended, as systemd or a person would. The store of the rendezvous runs
beside the hosts, by `launch/local/store.sh`. At random moments the program kills a worker, the server that forked it,
an agent or a whole host, or cuts a link for a while. Each time the run must train again by itself. When the time is
up, the faults stop and the run goes on to its end. It must then have the weights and the ledger of an undisturbed run.
A table shows how long each recovery took and how many steps were repeated.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from faults import KINDS, Fault, Step, table
from hosts import SWITCH, Host, Network, kill, obstacle
from rich.console import Console

from disttrain.commands.compare import compare_runs
from disttrain.launching.torchrun import RANK_NAME
from disttrain.run.directory import RunDirectory

ROOT = Path(__file__).parents[2]
PORT = 29500
STEP_S = 0.2
"""The sleep of a step while there are faults; afterwards steps do not sleep."""
TIMEOUT_S = 30
"""The run's timeout_s; a link is cut for up to one and a half times as long."""
RECOVERS_WITHIN_S = 300.0
ENDS_WITHIN_S = 900.0

CFG = """
import os, pathlib, time, uuid
from functools import partial
import torch
from torch import nn
from torch.utils.data import Dataset
from disttrain import Config
from disttrain.engine import Events

class Noisy(Dataset):
    def __len__(self):
        return 200
    def __getitem__(self, i):
        return torch.full((64,), i / 200) + 0.1 * torch.rand(64), i % 10

def net():
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))

def slow_with_progress(trainer, run):
    life, progress = uuid.uuid4().hex[:8], os.open("progress", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def slow():
        if not os.path.exists("hurry"):
            time.sleep({step_s})
    def write_progress():
        if run.backend.rank == 0:
            line = f"{{time.time():.3f}} {{life}} {{trainer.state.iteration}} {{run.backend.world_size}}\\n"
            os.write(progress, line.encode())
    trainer.add_event_handler(Events.ITERATION_STARTED, slow)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, write_progress)

config = Config(
    name="chaos", model=net, train_data=Noisy, loss=nn.CrossEntropyLoss(),
    optimizer=partial(torch.optim.AdamW, lr=1e-3),
    global_batch_size=40, num_slots=4, max_steps={num_steps}, handlers=[slow_with_progress], timeout_s={timeout_s},
    log={{"tensorboard": False}}, checkpoint={{"every_steps": 5, "keep": 2}}, ledger={{"every_steps": 5}},
)
"""
SUPERVISOR = """
until STORE=1 {script} 1:{hosts} {address} 1 cfg.py --runs runs --max-restarts 1000; do
  echo "--- the agent ended with $? at $(date +%T)"
  sleep 1
done
"""


@dataclass
class Campaign:
    """A run and its faults. The seed of `draws` fixes the choice of the faults; their effects also depend on timing."""

    folder: Path
    network: Network
    num_steps: int
    draws: random.Random
    kinds: tuple[str, ...] = KINDS
    log: Callable[[str], None] = print
    faults: list[Fault] = field(default_factory=list)
    seconds: float = 0.0
    _due: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    _steps: list[Step] = field(default_factory=list)
    _read: int = 0
    _cut: set[str] = field(default_factory=set)

    def run(self, minutes: float) -> None:
        """Start the hosts, disturb them for `minutes`, and let the run end; AssertionError if it does not."""
        (self.folder / "cfg.py").write_text(CFG.format(step_s=STEP_S, num_steps=self.num_steps, timeout_s=TIMEOUT_S))
        began = time.monotonic()
        store = [str(ROOT / "launch/local/store.sh"), f"{SWITCH}:{PORT}"]
        self.network.at_switch(store, self.folder / "store.txt", environment())
        for host in self.network.hosts:
            self._boot(host)
        self._until(lambda: bool(self.steps()), RECOVERS_WITHIN_S, "the run to begin")
        while time.monotonic() - began < 60 * minutes:
            self._rest(self.draws.uniform(0, 8))
            if not self._disturb():
                continue
            if self.draws.random() < 0.85:
                self._until(self._settled, RECOVERS_WITHIN_S, "the run to train again")
        self._until(self._settled, RECOVERS_WITHIN_S, "the run to train again")
        self._until(lambda: not self._due, RECOVERS_WITHIN_S, "all hosts to be back")
        (self.folder / "hurry").touch()
        self._until(self._ended, ENDS_WITHIN_S, "the run to end")
        self.seconds = time.monotonic() - began

    def steps(self) -> list[Step]:
        """Return the steps that rank 0 has written to `progress` so far."""
        path = self.folder / "progress"
        if path.exists():
            with path.open() as file:
                file.seek(self._read)
                for line in file:
                    if line.endswith("\n"):
                        at, life, number, world_size = line.split()
                        self._steps.append(Step(float(at), life, int(number), int(world_size)))
                        self._read += len(line)
        return self._steps

    def _settled(self) -> bool:
        steps = self.steps()
        for fault in self.faults:
            if fault.again_s is None and fault.settle(steps):
                how = "went on" if not fault.stopped else f"trained again, {fault.lost} steps lost"
                self.log(f"    {fault.kind} {fault.host}: {how}, {fault.again_s:.1f} s, world {steps[-1].world_size}")
        return all(fault.again_s is not None for fault in self.faults)

    def _ended(self) -> bool:
        result = RunDirectory(self.folder / "runs/chaos").result()
        return result is not None and result["status"] == "completed" and not any(h.up for h in self.network.hosts)

    def _disturb(self) -> bool:
        """Cause one random fault on one random host; return False if that host or process is not there."""
        kind = self.draws.choice(self.kinds)
        host = self.draws.choice(self.network.hosts)
        if not host.up or host.name in self._cut:
            return False
        fault = Fault(kind, host.name, time.time(), self.steps()[-1].life)
        if kind == "host":
            fault.lasts_s = self.draws.uniform(1, 15)
            host.crash()
            self._later(fault.lasts_s, lambda: self._boot(host))
        elif kind == "link":
            fault.lasts_s = self.draws.uniform(0.5, 1.5 * TIMEOUT_S)
            host.cut()
            self._cut.add(host.name)
            self._later(fault.lasts_s, lambda: self._mend(host))
        else:
            pids = [pid for pid, name, command in host.processes() if is_a(kind, name, command)]
            if not pids or not kill(self.draws.choice(pids)):
                return False
        self.faults.append(fault)
        self.log(f"{time.strftime('%T')} {kind} of {host.name}" + f" for {fault.lasts_s:.1f} s" * (fault.lasts_s > 0))
        return True

    def _boot(self, host: Host) -> None:
        script = SUPERVISOR.format(
            script=ROOT / "launch/local/several_hosts.sh", hosts=len(self.network.hosts), address=f"{SWITCH}:{PORT}"
        )
        host.boot(f"cd {self.folder}\n{script}", self.folder / f"{host.name}.txt", environment())

    def _mend(self, host: Host) -> None:
        host.mend()
        self._cut.discard(host.name)

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._due.append((time.monotonic() + seconds, action))

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._until(lambda: time.monotonic() >= until, seconds + 60, "a pause to be over")

    def _until(self, holds: Callable[[], bool], within_s: float, event: str) -> None:
        """Wait until `holds` returns True, and run the delayed actions that fall due meanwhile."""
        began = time.monotonic()
        while not holds():
            for entry in [entry for entry in self._due if entry[0] <= time.monotonic()]:
                self._due.remove(entry)
                entry[1]()
            assert time.monotonic() - began < within_s, f"waited {within_s:.0f} s in vain for {event}"
            time.sleep(0.05)


def environment() -> dict[str, str]:
    """Return the environment of a host: that of this process, without the variables of a launcher."""
    hidden = ("TORCHELASTIC", "SLURM", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return kept | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0"}


def is_a(kind: str, name: str, command: str) -> bool:
    """Return whether a process is of this kind: a worker (a rank), the server that forks the ranks, or an agent."""
    if kind == "agent":
        return "-m disttrain launch " in command
    return "multiprocessing.forkserver" in command and (name == RANK_NAME) == (kind == "worker")


def undisturbed(folder: Path) -> RunDirectory:
    """Run the same config in one process, without faults."""
    alone = folder / "undisturbed"
    alone.mkdir()
    shutil.copy(folder / "cfg.py", alone)
    (alone / "hurry").touch()
    command = [sys.executable, "-m", "disttrain.launch", "cfg.py", "--runs", "runs"]
    subprocess.run(command, cwd=alone, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    return RunDirectory(alone / "runs/chaos")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="the faults to choose from (all)")
    parser.add_argument("--keep", type=Path, help="a folder for the run and its logs, which stays")
    options = parser.parse_args()
    if (reason := obstacle()) is not None:
        print(f"chaos: skipped: {reason}")
        return 0
    folder = options.keep or Path(tempfile.mkdtemp(prefix="disttrain-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    num_steps = int(60 * options.minutes / STEP_S) + 100  # too many for the time of the faults: the end comes after it
    try:
        with Network(3) as network:
            campaign = Campaign(
                folder.absolute(), network, num_steps, random.Random(options.seed), tuple(options.kinds)
            )
            campaign.run(options.minutes)
        same = report(campaign, folder)
    except AssertionError as error:
        print(f"chaos: {error}; the logs are in {folder}")
        return 1
    if same and options.keep is None:
        shutil.rmtree(folder)
    return 0 if same else 1


def report(campaign: Campaign, folder: Path) -> bool:
    """Print the table, and whether the run has the bits of an undisturbed one; return whether it has."""
    disturbed, whole = RunDirectory(folder / "runs/chaos"), undisturbed(folder)
    compared = compare_runs(disturbed, whole)
    digests = [json.loads(run.result_json.read_text())["params_sha256"] for run in (disturbed, whole)]
    same = compared.same and digests[0] == digests[1] and compared.last_steps == (campaign.num_steps,) * 2
    Console(width=160).print(table(campaign.faults))
    steps = campaign.steps()
    print(
        f"{campaign.seconds:.0f} s, {len({step.life for step in steps})} lives of rank 0, worlds of "
        f"{', '.join(map(str, sorted({step.world_size for step in steps})))}; {campaign.num_steps} steps, "
        f"{len(steps) - campaign.num_steps} of them repeated. "
        f"{'The same bits' if same else 'OTHER BITS'}: {digests[0][:12]} and {digests[1][:12]}; "
        f"{compared.num_steps} ledger lines compared, {compared.num_hashed} with hashes of the whole state."
    )
    return same


if __name__ == "__main__":
    sys.exit(main())
