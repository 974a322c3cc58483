"""Plan the runs of `disttrain verify`: a reference, a repetition, other ranks, other workers, killed, resized.

*Contract*: the plan is a function of its arguments, so a second verification makes the same runs and kills.
"""

import itertools
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from disttrain.engine import Engine, Events
from disttrain.launching.interpreter import Surroundings
from disttrain.run.state import Run
from disttrain.seeding import seed_for


@dataclass(frozen=True)
class Life:
    """One process group of a run: its ranks and workers, and the step in which one of its ranks is killed.

    `overrides` are config overrides of this life alone, such as "strategy=fsdp". With `surroundings` the life is an
    interpreter of its own; without, its ranks are forked off a process that the verification's lives share.
    """

    num_ranks: int
    num_workers: int
    killed_at: int | None = None
    overrides: tuple[str, ...] = ()
    surroundings: Surroundings | None = None


@dataclass(frozen=True)
class Scenario:
    """A whole run; it has one life more than kills."""

    name: str
    lives: tuple[Life, ...]


@dataclass(frozen=True)
class Death:
    """A handler that kills a rank with SIGKILL in `step`, after the update and before anything of the step is saved."""

    step: int
    changes_nothing: ClassVar[bool] = True
    """So that a verified run saves as the user's own run does (checkpoint.asynchronous)."""

    def __call__(self, trainer: Engine, run: Run) -> None:
        # Not always rank 0: the other ranks notice its death in another way than that of a peer.
        doomed_rank = self.step % run.backend.world_size

        def die() -> None:
            if run.backend.rank == doomed_rank:
                os.kill(os.getpid(), signal.SIGKILL)

        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=self.step), die)


def plan(worlds: Sequence[int], workers: Sequence[int], num_kills: int, num_steps: int) -> list[Scenario]:
    """Return the runs of a verification, the reference first.

    `worlds` and `workers` are numbers of ranks and of workers; the first of each is the reference's.
    """
    first = Life(worlds[0], workers[0])
    scenarios = [Scenario("reference", (first,)), Scenario("again", (first,))]
    turns = itertools.cycle(workers[1:] or workers)
    scenarios += [Scenario(counted(ranks, "rank"), (Life(ranks, next(turns)),)) for ranks in worlds[1:]]
    left_over = workers[len(worlds) :] if len(worlds) > 1 else workers[1:]
    scenarios += [Scenario(counted(number, "worker"), (Life(worlds[0], number),)) for number in left_over]
    if num_kills:
        scenarios.append(killed("killed", [worlds[0]], [workers[0]], num_kills, num_steps))
        if len(worlds) > 1 or len(workers) > 1:
            downwards = sorted(worlds, reverse=True)
            scenarios.append(killed("killed, resized", downwards, workers, num_kills, num_steps))
    return scenarios


def killed(name: str, worlds: Sequence[int], workers: Sequence[int], num_kills: int, num_steps: int) -> Scenario:
    """Return a run that is killed once in each of `num_kills` equal parts; its lives cycle over ranks and workers."""
    ends = [num_steps * i // num_kills for i in range(num_kills + 1)]
    steps = [low + 1 + seed_for(0, name, i) % (high - low) for i, (low, high) in enumerate(itertools.pairwise(ends))]
    ranks, processes = itertools.cycle(worlds), itertools.cycle(workers)
    return Scenario(name, tuple(Life(next(ranks), next(processes), step) for step in [*steps, None]))


def counted(number: int, noun: str) -> str:
    """Return the number with its noun, such as "1 rank" or "2 ranks"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
