"""What `disttrain verify` runs: a reference, the same again, on other ranks, with other workers, killed, resized.

*Contract*: the plan is a function of its arguments, so that what was found is found again.
"""

import itertools
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from disttrain.engine import Engine, Events
from disttrain.run import Run
from disttrain.seeding import seed_for


@dataclass(frozen=True)
class Life:
    """One process group of a run: how many ranks and workers, and the step in which one of its ranks is killed.

    `overrides` are for this life alone, such as "strategy=fsdp".
    """

    num_ranks: int
    num_workers: int
    killed_at: int | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scenario:
    """A whole run, in one life more than it is killed times."""

    name: str
    lives: tuple[Life, ...]


@dataclass(frozen=True)
class Death:
    """A handler that kills its rank with SIGKILL in `step`, after the update and before anything of it is kept."""

    step: int

    def __call__(self, trainer: Engine, run: Run) -> None:
        # Not always rank 0: its death is seen by the others otherwise than that of a peer.
        doomed = self.step % run.backend.world_size

        def die() -> None:
            if run.backend.rank == doomed:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=self.step), die)


def plan(worlds: Sequence[int], workers: Sequence[int], num_kills: int, num_steps: int) -> list[Scenario]:
    """Return the runs to make, the reference first."""
    first = Life(worlds[0], workers[0])
    scenarios = [Scenario("reference", (first,)), Scenario("again", (first,))]
    turns = itertools.cycle(workers[1:] or workers)
    scenarios += [Scenario(counted(ranks, "rank"), (Life(ranks, next(turns)),)) for ranks in worlds[1:]]
    not_yet = workers[len(worlds) :] if len(worlds) > 1 else workers[1:]
    scenarios += [Scenario(counted(number, "worker"), (Life(worlds[0], number),)) for number in not_yet]
    if num_kills:
        scenarios.append(killed("killed", [worlds[0]], [workers[0]], num_kills, num_steps))
        if len(worlds) > 1 or len(workers) > 1:
            downwards = sorted(worlds, reverse=True)
            scenarios.append(killed("killed, resized", downwards, workers, num_kills, num_steps))
    return scenarios


def killed(name: str, worlds: Sequence[int], workers: Sequence[int], num_kills: int, num_steps: int) -> Scenario:
    """Return a run killed at a step of each of `num_kills` equal parts of it; ranks and workers take turns."""
    ends = [num_steps * i // num_kills for i in range(num_kills + 1)]
    steps = [low + 1 + seed_for(0, name, i) % (high - low) for i, (low, high) in enumerate(itertools.pairwise(ends))]
    ranks, processes = itertools.cycle(worlds), itertools.cycle(workers)
    return Scenario(name, tuple(Life(next(ranks), next(processes), step) for step in [*steps, None]))


def counted(number: int, what: str) -> str:
    """Return such as "1 rank" or "2 ranks"."""
    return f"{number} {what}{'' if number == 1 else 's'}"
