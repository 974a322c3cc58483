"""SIGKILL at random moments of a run that saves after every step: `python tests/soak/kills.py [--kills 200]`.

A real run (the launcher, DDP, gloo) is killed and started again until it has had its kills, then left to its end. In
each life one rank or all are killed, while starting, loading, training or saving. After every kill each committed
checkpoint must be good, and the newest not older than what the run had been told was saved; the next life must go on
from it, with nothing found damaged; and at the end the weights must have the bits of a run that nobody killed.
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

from disttrain import launch
from disttrain.backend.local import LocalRanks
from disttrain.checkpoint import survey
from disttrain.engine import Engine, Events
from disttrain.run import Run
from disttrain.verify import PRELOAD

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
"""Of the kills fall before a life has saved anything: while it starts and loads."""
LONGEST_WAIT_S = 0.5
"""From a life's first save to its death, at most."""


@dataclass(frozen=True)
class Acknowledged:
    """A handler by which rank 0 notes, outside the run, which step it has been told is saved."""

    path: str
    delay: int
    """Steps from a save to its acknowledgement: asynchronous saves are known to be there one save later."""
    changes_nothing = True

    def __call__(self, trainer: Engine, run: Run) -> None:
        if run.backend.rank == 0:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT)

            def note() -> None:
                os.pwrite(descriptor, f"{trainer.state.iteration - self.delay:12}\n".encode(), 0)

            trainer.add_event_handler(Events.ITERATION_STARTED, note)


def rank_main(words: Sequence[str], note: Acknowledged) -> int:
    """What each rank runs."""
    return launch.main(words, handlers=[note])


@dataclass
class Report:
    """What a campaign found."""

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
    """Kills runs in a folder of their own; the seed gives the moments, as far as timing lets it."""

    def __init__(
        self,
        folder: Path,
        *,
        ranks: int = 2,
        asynchronous: bool = False,
        seed: int = 0,
        num_steps: int = 200,
        width: int = 4000,  # 3.6 MB: worth a file of each of two ranks
    ) -> None:
        self.folder = folder
        self.ranks = ranks
        self.moments = random.Random(seed)
        self.report = Report()
        self._delay = 2 if asynchronous else 1
        self._cfg = folder / "soak.py"
        self._cfg.write_text(CFG.format(width=width, num_steps=num_steps, asynchronous=asynchronous))

    def run(self, num_kills: int) -> Report:
        """Kill runs until there were `num_kills`; return what was found."""
        began = time.monotonic()
        whole = self._whole("reference")
        while self.report.kills < num_kills:
            self.report.runs += 1
            place = self.folder / f"run-{self.report.runs}"
            ended = False
            while not ended and self.report.kills < num_kills:
                ended = self._life(place, kill=True)
            if not ended:
                self._life(place, kill=False)
            self.report.same_bits += self._sha256(place) == whole
        self.report.seconds = time.monotonic() - began
        return self.report

    def _whole(self, name: str) -> str:
        self._life(self.folder / name, kill=False)
        return self._sha256(self.folder / name)

    def _sha256(self, place: Path) -> str:
        return str(json.loads((place / "soak" / "result.json").read_text())["params_sha256"])

    def _life(self, place: Path, *, kill: bool) -> bool:
        """Start the ranks and kill them, or let them go on to the end; return whether the run has ended."""
        place.mkdir(exist_ok=True)
        checkpoints, acknowledged = place / "soak" / "checkpoints", place / "acknowledged"
        newest = max((entry.step for entry in survey(checkpoints, quick=True) if entry.state != "tmp"), default=0)
        acknowledged.write_text(f"{newest:12}\n")
        logs = Path(tempfile.mkdtemp(dir=place, prefix="life-"))
        words = [str(self._cfg), "--runs", str(place)]
        note = Acknowledged(str(acknowledged), self._delay)
        with LocalRanks(self.ranks, rank_main, (words, note), logs, PRELOAD) as ranks:
            killed = kill and self._kill(acknowledged, newest)
            codes = ranks.wait()
        self._check_log(ranks.logs[0], newest)
        ended = codes == [0] * self.ranks
        if not ended:
            assert killed, f"{codes}\n{ranks.logs[0].read_text()}"
            self._check_checkpoints(checkpoints, max(newest, int(acknowledged.read_text())))
        return ended

    def _kill(self, acknowledged: Path, newest: int) -> bool:
        """Wait for a random moment of this life and send SIGKILL to a rank or to all; False where it was over."""
        early = self.moments.random() < SHARE_EARLY
        victims = list(active_children())
        if not early:
            while int(acknowledged.read_text() or 0) <= newest and all(each.is_alive() for each in victims):
                time.sleep(0.002)
        time.sleep(self.moments.uniform(0, LONGEST_WAIT_S))
        if self.moments.random() < 0.5:
            victims = [self.moments.choice(victims)]
        alive = all(victim.is_alive() for victim in victims)
        self.report.kills += alive
        self.report.early += alive and early
        for victim in victims:
            victim.kill()
        return alive

    def _check_log(self, log: Path, newest: int) -> None:
        said = log.read_text() if log.exists() else ""  # it was killed before it could say anything
        resumed = re.search(r"resuming from step (\d+)", said)
        self.report.damaged += said.count("is damaged")
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
        found = campaign.run(options.kills)
    kind = "asynchronous" if options.asynchronous else "synchronous"
    print("| saves | ranks | kills | of them while starting | torn saves left | lost | damaged | same bits | time |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {kind} | {options.ranks} | {found.kills} | {found.early} | {found.torn} | {found.lost} | {found.damaged} "
        f"| {found.same_bits} of {found.runs} runs | {found.seconds:.0f} s |"
    )
    return 0 if found.good else 1


if __name__ == "__main__":
    sys.exit(main())
