"""SIGKILL at random moments of a run that saves after every step: `python tests/soak/kills.py [--kills 200]`.

A real run (the launcher, DDP, gloo) is killed and restarted until the number of kills is reached; then it runs to its
end. In each life the program kills one rank or all, while they start, load, train or save. After every kill, each
committed checkpoint must be good, and the newest must not be older than the newest save of which the run knew. The next
life must resume from it and find nothing damaged. At the end the weights must have the bits of a run without kills.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path

from disttrain.checkpoint import survey
from disttrain.commands import launch
from disttrain.commands.start_ranks import PRELOAD
from disttrain.engine import Engine, Events
from disttrain.launching.local_ranks import LocalRanks
from disttrain.run.state import Run

CFG = """
from functools import partial
import torch
from torch import nn
from torch.utils.data import Dataset
from disttrain import Config

class Noisy(Dataset):
    def __len__(self):
        return 200
    def __getitem__(self, i):
        return torch.full((64,), i / 200) + 0.1 * torch.rand(64), i % 10

def net():
    return nn.Sequential(nn.Linear(64, {width}), nn.ReLU(), nn.Dropout(0.2), nn.Linear({width}, 10))

config = Config(
    name="soak", model=net, train_data=Noisy, loss=nn.CrossEntropyLoss(), optimizer=partial(torch.optim.AdamW, lr=1e-3),
    global_batch_size=40, num_slots=4, max_steps={num_steps}, log={{"tensorboard": False}},
    checkpoint={{"every_steps": 1, "keep": 2, "asynchronous": {asynchronous}}},
)
"""
SHARE_EARLY = 0.2
"""The share of kills before a life has saved anything: while it starts and loads."""
LONGEST_WAIT_S = 0.5
"""The longest time from a life's first save to the kill."""


@dataclass(frozen=True)
class Acknowledged:
    """A handler by which rank 0 notes, in a file outside the run, the newest step that it knows to be saved."""

    path: str
    delay: int
    """Steps from a save to its acknowledgement: an asynchronous save is acknowledged by the next save."""
    changes_nothing = True

    def __call__(self, trainer: Engine, run: Run) -> None:
        if run.backend.rank == 0:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT)

            def note() -> None:
                os.pwrite(descriptor, f"{trainer.state.iteration - self.delay:12}\n".encode(), 0)

            trainer.add_event_handler(Events.ITERATION_STARTED, note)


def rank_main(arguments: Sequence[str], note: Acknowledged) -> int:
    """Run one rank."""
    return launch.main(arguments, handlers=[note])


@dataclass
class Report:
    """The counts of a campaign."""

    kills: int = 0
    early: int = 0
    torn: int = 0
    lost: int = 0
    damaged: int = 0
    runs: int = 0
    same_bits: int = 0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return not self.lost and not self.damaged and self.same_bits == self.runs


class Campaign:
    """Kills runs in a folder of their own. The seed fixes the random draws; the moments also depend on timing."""

    def __init__(
        self,
        folder: Path,
        *,
        ranks: int = 2,
        asynchronous: bool = False,
        seed: int = 0,
        num_steps: int = 200,
        width: int = 4000,  # 3.6 MB: enough for two ranks to write a file each
    ) -> None:
        self.folder = folder
        self.ranks = ranks
        self.draws = random.Random(seed)
        self.report = Report()
        self._delay = 2 if asynchronous else 1
        self._cfg = folder / "soak.py"
        self._cfg.write_text(CFG.format(width=width, num_steps=num_steps, asynchronous=asynchronous))

    def run(self, num_kills: int) -> Report:
        """Kill runs until there were `num_kills` kills; return the report."""
        began = time.monotonic()
        whole = self._whole("reference")
        while self.report.kills < num_kills:
            self.report.runs += 1
            folder = self.folder / f"run-{self.report.runs}"
            ended = False
            while not ended and self.report.kills < num_kills:
                ended = self._life(folder, kill=True)
            if not ended:
                self._life(folder, kill=False)
            self.report.same_bits += self._sha256(folder) == whole
        self.report.seconds = time.monotonic() - began
        return self.report

    def _whole(self, name: str) -> str:
        self._life(self.folder / name, kill=False)
        return self._sha256(self.folder / name)

    def _sha256(self, folder: Path) -> str:
        return str(json.loads((folder / "soak" / "result.json").read_text())["params_sha256"])

    def _life(self, folder: Path, *, kill: bool) -> bool:
        """Start the ranks and kill them, or let them run to the end; return whether the run has ended."""
        folder.mkdir(exist_ok=True)
        checkpoints, acknowledged = folder / "soak" / "checkpoints", folder / "acknowledged"
        newest = max((entry.step for entry in survey(checkpoints, quick=True) if entry.state != "tmp"), default=0)
        acknowledged.write_text(f"{newest:12}\n")
        logs = Path(tempfile.mkdtemp(dir=folder, prefix="life-"))
        arguments = [str(self._cfg), "--runs", str(folder)]
        note = Acknowledged(str(acknowledged), self._delay)
        with LocalRanks(self.ranks, rank_main, (arguments, note), logs, PRELOAD) as ranks:
            killed = kill and self._kill(acknowledged, newest)
            codes = ranks.wait()
        self._check_log(ranks.logs[0], newest)
        ended = codes == [0] * self.ranks
        if not ended:
            assert killed, f"{codes}\n{ranks.logs[0].read_text()}"
            self._check_checkpoints(checkpoints, max(newest, int(acknowledged.read_text())))
        return ended

    def _kill(self, acknowledged: Path, newest: int) -> bool:
        """Wait for a random moment of this life and kill one rank or all; return False if one had already ended."""
        early = self.draws.random() < SHARE_EARLY
        victims = list(active_children())
        if not early:
            while int(acknowledged.read_text() or 0) <= newest and all(victim.is_alive() for victim in victims):
                time.sleep(0.002)
        time.sleep(self.draws.uniform(0, LONGEST_WAIT_S))
        if self.draws.random() < 0.5:
            victims = [self.draws.choice(victims)]
        alive = all(victim.is_alive() for victim in victims)
        self.report.kills += alive
        self.report.early += alive and early
        for victim in victims:
            victim.kill()
        return alive

    def _check_log(self, log: Path, newest: int) -> None:
        text = log.read_text() if log.exists() else ""  # a rank may be killed before it writes a log
        resumed = re.search(r"resuming from step (\d+)", text)
        self.report.damaged += text.count("is damaged")
        if resumed is not None:
            self.report.lost += int(resumed[1]) != newest

    def _check_checkpoints(self, checkpoints: Path, acknowledged: int) -> None:
        entries = survey(checkpoints)
        self.report.torn += sum(entry.state == "tmp" for entry in entries)
        self.report.damaged += sum(entry.state == "damaged" for entry in entries)
        newest = max((entry.step for entry in entries if entry.state == "good"), default=0)
        self.report.lost += newest < acknowledged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asynchronous", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="disttrain-kills-") as folder:
        campaign = Campaign(Path(folder), ranks=options.ranks, asynchronous=options.asynchronous, seed=options.seed)
        report = campaign.run(options.kills)
    kind = "asynchronous" if options.asynchronous else "synchronous"
    print("| saves | ranks | kills | of them while starting | torn saves left | lost | damaged | same bits | time |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {kind} | {options.ranks} | {report.kills} | {report.early} | {report.torn} | {report.lost} "
        f"| {report.damaged} | {report.same_bits} of {report.runs} runs | {report.seconds:.0f} s |"
    )
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
