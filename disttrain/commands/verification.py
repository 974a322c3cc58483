"""The runs of a verification: each life's ranks are started, killed where the plan says so, and waited for.

*Contract*: a life with surroundings has an interpreter of its own; the ranks of other lives are forked off one server.
Everything is written below one folder.
"""

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from disttrain.checkpoint import is_url
from disttrain.commands import launch
from disttrain.commands.attacks import Setting, as_in_reference
from disttrain.commands.lost_state import record_handler_state
from disttrain.commands.scenarios import Death, Life, Scenario, counted
from disttrain.commands.start_ranks import PRELOAD, modules_for
from disttrain.config import Config
from disttrain.errors import DisttrainError
from disttrain.launching.interpreter import Interpreter, RanksEnded, Surroundings
from disttrain.launching.local_ranks import LocalRanks
from disttrain.run.directory import RunDirectory

PRELOAD_FSDP = ("torch.distributed.tensor", "torch.distributed.fsdp")
NUM_QUOTED_LINES = 20


class CannotRun(DisttrainError):
    """A run of the verification that ended in another way than by its planned death or with exit code 0.

    `last_line` is the last line that its ranks printed.
    """

    def __init__(self, message: str, last_line: str = "") -> None:
        super().__init__(message)
        self.last_line = last_line


def run_rank(words: Sequence[str], killed_at: int | None) -> int:
    """Run `launch` on one rank of a verification; the rank dies in step `killed_at`, if it is the doomed one."""
    deaths = () if killed_at is None else (Death(killed_at),)
    return launch.main(words, handlers=(*deaths, record_handler_state))


def from_any_folder(config: Config) -> list[str]:
    """Return the override that makes the path of `init_from` absolute; lives have working directories of their own."""
    path = config.init_from.path
    return [] if path is None or is_url(path) else [f"init_from.path={Path(path).absolute()}"]


class Verification:
    """Runs the scenarios of one config, each in a folder of its own inside `folder`. `close` ends what still runs."""

    def __init__(
        self,
        cfg: Path,
        config: Config,
        overrides: Sequence[str],
        folder: Path,
        *,
        num_slots: int,
        num_steps: int,
        preload: Sequence[str] = PRELOAD,
    ) -> None:
        self.folder = folder
        self.num_steps = num_steps
        self.left_alone: list[Setting] = []
        """Settings that all lives from now on have as the reference has them."""
        self._preload = [*preload, *(PRELOAD_FSDP if config.strategy == "fsdp" else ())]
        self._preload += modules_for(config)
        # torch keeps compiled code in the temporary directory, and each life has another one.
        self._variables = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")} if config.compile else {}
        self._name = str(config.name)
        self._ahead: Interpreter | None = None
        self._words = [
            str(cfg),
            f"checkpoint.every_steps={max(1, num_steps // 10)}",
            "log.tensorboard=false",
            *overrides,
            "checkpoint.target=none",  # each scenario is a run of its own
            *from_any_folder(config),
            f"num_slots={num_slots}",
            "max_epochs=none",
            f"max_steps={num_steps}",
            "early_stop.monitor=none",  # all lives have as many steps
            "log.every_steps=1",  # a killed run has written the lines of all its steps
            "ledger.every_steps=1",
        ]

    def run(self, scenario: Scenario, following: Scenario | None = None) -> RunDirectory:
        """Run a scenario to its end and return its run directory; CannotRun if that fails.

        Meanwhile the interpreter of the first life of `following` starts.
        """
        folder = self._new_folder(scenario.name)
        lives = [as_in_reference(life, self.left_alone) for life in scenario.lives]
        after = [] if following is None else [as_in_reference(following.lives[0], self.left_alone)]
        for number, (life, upcoming) in enumerate(zip(lives, [*lives[1:], *after, None], strict=False), start=1):
            words = [*self._words, f"num_workers={life.num_workers}", *life.overrides, "--runs", str(folder)]
            ended = self._run_life(life, upcoming, (words, life.killed_at), folder / f"life-{number}")
            if ended.first_failed != (-signal.SIGKILL if life.killed_at else None):
                output = quoted_output(ended.logs)
                raise CannotRun(
                    f"{scenario.name}, on {counted(life.num_ranks, 'rank')} with "
                    f"{counted(life.num_workers, 'worker')}: the ranks ended with "
                    f"{', '.join(map(str, ended.codes))}, expected "
                    + (f"the death of one in step {life.killed_at}" if life.killed_at else "0")
                    + f". Their output:\n{output}",
                    output.rpartition("\n")[2].strip(),
                )
        return RunDirectory(folder / self._name)

    def _new_folder(self, name: str) -> Path:
        """Return a folder that is not there yet; a scenario that is run again gets another."""
        stem = name.replace(",", "").replace(" ", "-")
        folder, number = self.folder / stem, 1
        while folder.exists():
            number += 1
            folder = self.folder / f"{stem}-{number}"
        return folder

    def _run_life(self, life: Life, upcoming: Life | None, arguments: tuple[object, ...], logs: Path) -> RanksEnded:
        if life.surroundings is None:
            logs.mkdir(parents=True)
            with LocalRanks(life.num_ranks, run_rank, arguments, logs, self._preload) as ranks:
                return RanksEnded(ranks.wait(), ranks.first_failed, ranks.logs)
        interpreter = self._interpreter(life.surroundings)
        try:
            if upcoming is not None and upcoming.surroundings is not None:
                self._ahead = self._started(upcoming.surroundings)
            return interpreter.run(life.num_ranks, run_rank, arguments, logs)
        except DisttrainError as error:
            raise CannotRun(str(error), str(error).splitlines()[-1]) from None
        finally:
            interpreter.close()
            for used in (life.surroundings.working_directory, life.surroundings.temporary_directory):
                if used is not None:
                    shutil.rmtree(used, ignore_errors=True)

    def _interpreter(self, surroundings: Surroundings) -> Interpreter:
        """Return the interpreter that was started ahead, if it has these surroundings, or a new one."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.surroundings == surroundings:
            return ahead
        if ahead is not None:
            ahead.close()
        return self._started(surroundings)

    def _started(self, surroundings: Surroundings) -> Interpreter:
        return Interpreter(surroundings, self._preload, self._variables)

    def close(self) -> None:
        """End an interpreter that was started ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def quoted_output(logs: Sequence[Path]) -> str:
    """Return the last lines that one rank printed: the first rank with an error, or rank 0."""
    texts = [log.read_text(encoding="utf-8", errors="replace").strip() for log in logs if log.exists()]
    with_error = [text for text in texts if "Error" in text] or texts or [""]
    return "\n".join(f"  {line}" for line in with_error[0].splitlines()[-NUM_QUOTED_LINES:])
