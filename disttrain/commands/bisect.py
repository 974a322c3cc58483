"""`disttrain bisect RUN --against ...`: the first step, and in it the first module, that other code computes otherwise.

*Contract*: RUN is only read. Two runs are halved over the states of their ledgers. Other code is held against RUN's
ledger: from a checkpoint it computes the next two steps, halving over the checkpoints, and then every step from the
last checkpoint from which it still computed the run's. Halving takes for granted that code which differs at one
checkpoint differs at all later ones; where nothing differs, the steps before are computed too. Then both sides compute
the step that was found, with the outputs of all modules. Exit code 0: no difference; 1: a difference; 2: it cannot be
done.
"""

import argparse
import json
import logging
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from disttrain.commands.bisect_sides import Side, SideDone, described, newest_launch, sides_of
from disttrain.commands.closed_output import output_may_close
from disttrain.commands.exit_codes import DIFFERENT, INTERRUPTED, SAME
from disttrain.commands.failures import print_error
from disttrain.config import blocking_differences, differences_that_matter, read_stored
from disttrain.errors import ConfigError, DisttrainError
from disttrain.evidence import LedgerDifference, first_difference, read_ledger
from disttrain.evidence.ledger import Line
from disttrain.evidence.module_outputs import OutputDifference, first_output_difference
from disttrain.files import json_text, printable
from disttrain.launching.torchrun import report_exit_code
from disttrain.run.directory import RunDirectory
from disttrain.run.launches import read_launches
from disttrain.run.replay_start import starts_before


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = bisect_parser().parse_args(arguments)
    logging.getLogger("disttrain").addHandler(logging.NullHandler())
    with output_may_close(), ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bisect-")))
            sides = sides_of(options.run, options.against, stack)
            console = Console(stderr=True, highlight=False, markup=False, emoji=False)
            bisection = Bisection(sides, folder, console, options.since)
            stack.callback(bisection.close)
            return report_exit_code(print_found(bisection.find(), options))
        except KeyboardInterrupt:
            print("Interrupted: the run is as it was", file=sys.stderr)
            return INTERRUPTED
        except DisttrainError as error:
            return report_exit_code(print_error(error, options))


def bisect_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="disttrain bisect",
        description="Find the first step that differs between a run and other code, and the first module in it whose "
        "output or gradient differs. The steps are computed again on this host, from the run's checkpoints.",
        epilog="exit codes: 0: no difference; 1: a difference; 2: a mistake in the command, the config or their code",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run directory, such as runs/digits")
    add(
        "--against",
        metavar="CFG|COMMIT|PYTHON|RUN",
        required=True,
        help="the other side: a cfg.py; a commit of the git repository of the run's cfg.py; a Python interpreter, such "
        "as that of an environment with another torch; or another run",
    )
    add(
        "--from",
        metavar="STEP",
        type=int,
        default=0,
        dest="since",
        help="compute nothing before the checkpoint at or before this step (default: 0, the beginning of the run)",
    )
    add("--json", action="store_true", help="print one JSON object")
    add("--traceback", action="store_true", help="print the traceback of every error")
    return parser


class Found(NamedTuple):
    """The first difference of two sides; `difference` is None if there is none."""

    labels: tuple[str, str]
    first: int
    """The first step that was computed, one step after a state that both sides have."""
    last: int
    """The last step that was compared."""
    difference: LedgerDifference | None
    module: OutputDifference | None
    """The first output of a module in that step; None if all are the same, or if none was compared."""
    has_modules: bool = False
    """Whether the modules of that step were compared."""


class Bisection:
    """Compares two sides; what they compute goes into `folder`."""

    def __init__(self, sides: tuple[Side, Side], folder: Path, console: Console, since: int = 0) -> None:
        self._sides = sides
        self._folder = folder
        self._since = since
        self._is_proven = True
        """Whether the sides are held against the run's ledger, and end where they differ from it."""
        self._is_compiled = False
        """Whether the model of a side is compiled: then its modules have no outputs."""
        self._console = console
        self._running: list[Any] = []
        self._num_runs = 0

    def close(self) -> None:
        """End the processes that still compute."""
        for running in self._running:
            running.end()

    def find(self) -> Found:
        """Return the first difference of the two sides."""
        mine, other = self._sides
        lines = read_ledger(RunDirectory(Path(mine.run)).ledger_jsonl)
        theirs = read_ledger(RunDirectory(Path(other.run)).ledger_jsonl) if other.run != mine.run else None
        labels, last = (mine.label, other.label), max(lines)
        if theirs is not None:
            if (found := _first_of_ledgers(lines, theirs)) is None:
                return Found(labels, 1, min(last, max(theirs)), None, None)
            same_at, until = found
            starts = [self._starts(side, same_at + 1)[-1] for side in self._sides]
        else:
            candidates = self._starts(other, last)
            start = self._last_same(candidates, last)
            self._say(f"computing the steps from {start + 1} on with {other.label}")
            done = self._compute(((other, start),), last)[0]
            if not done.differs and start > candidates[0]:
                self._say(f"they are the same; computing those from {candidates[0] + 1} on, which were only sampled")
                last, start = start, candidates[0]
                done = self._compute(((other, start),), last)[0]
            if not done.differs:
                return Found(labels, start + 1, max(lines), None, None)
            if not done.lines:  # the state of the checkpoint itself is not the ledger's
                raise ConfigError(f"{other.label} cannot begin at step {start}: {done.text}")
            until, starts = max(1, *done.lines), [start, start]
        return self._found(labels, starts, until, min(max(lines), max(lines if theirs is None else theirs)))

    def _starts(self, side: Side, step: int) -> list[int]:
        """Return the steps of the checkpoints before a step from which both sides can go on, the oldest first."""
        directory = RunDirectory(Path(side.run))
        launches = read_launches(directory.launches, directory.cfg_py)
        launch = newest_launch(directory)
        fields = described(side, [] if launch is None else launch.record.overrides)
        stored = read_stored(directory.config_json).fields
        self._is_compiled |= bool(stored.get("compile")) or bool((fields or {}).get("compile"))
        if fields is not None:
            theirs = {**fields, "name": stored.get("name")}
            for each in differences_that_matter(stored, theirs):
                self._say(f"the configs differ in {each.field}: {each.old} and {each.new}")
            if blocking_differences(stored, theirs):
                return [0]  # no checkpoint of the run is one of that config
        steps = sorted(start.step for start in starts_before(directory, launches, step, self._console))
        before = [each for each in steps if each <= self._since]
        return [*before[-1:], *(each for each in steps if each > self._since)]

    def _last_same(self, starts: list[int], last: int) -> int:
        """Return the last checkpoint from which the other side still computes the run's next steps; else the first.

        Two steps: another update shows in the loss of the step after it.
        """
        low, high = 0, len(starts)  # the first is taken for granted
        while high - low > 1:
            middle = (low + high) // 2
            start = starts[middle]
            is_same = not self._compute(((self._sides[1], start),), min(start + 2, last))[0].differs
            self._say(f"from the checkpoint of step {start} on {'the same' if is_same else 'another'} step")
            low, high = (middle, high) if is_same else (low, middle)
        return starts[low]

    def _found(self, labels: tuple[str, str], starts: list[int], until: int, last: int) -> Found:
        """Compute both sides up to a step that is known to differ, and then the first that does, with its modules."""
        self._say(f"computing the steps {max(starts) + 1} to {until} on both sides")
        pairs = tuple(zip(self._sides, starts, strict=True))
        left, right = self._compute(pairs, until, modules=not self._is_compiled)
        first = max(starts) + 1
        difference = first_difference(left.lines, right.lines)
        if difference is None and self._is_proven:
            self._say(
                "this machine or its versions give other bits than the run's: the sides are held against each other"
            )
            self._is_proven = False
            return self._found(labels, starts, last, last)
        if difference is None:
            return Found(labels, first, until, None, None)
        module, has_modules = None, False
        may_be_in_module = difference.what not in ("order", "batch", "began", "left_out")
        may_be_in_module &= difference.step > max(starts)
        if may_be_in_module and self._is_compiled:
            self._say("the model is compiled: with compile=false the first module could be named")
        elif may_be_in_module:
            has_modules = True
            if difference.step != until:
                self._say(f"computing step {difference.step} on both sides, with the outputs of all modules")
                left, right = self._compute(pairs, difference.step, modules=True)
            module = first_output_difference(left.records, right.records)
        return Found(labels, first, until, difference, module, has_modules)

    def _compute(self, sides: Sequence[tuple[Side, int]], step: int, *, modules: bool = False) -> list[SideDone]:
        """Compute the sides, each from its start, at the same time."""
        self._running = []
        for side, start in sides:
            self._num_runs += 1
            place = self._folder / str(self._num_runs)
            self._running.append(side.begin(step, start, place, modules=modules, proven=self._is_proven))
        return [running.wait() for running in self._running]

    def _say(self, text: str) -> None:
        self._console.print(printable(text), soft_wrap=True)


def _first_of_ledgers(left: dict[int, Line], right: dict[int, Line]) -> tuple[int, int] | None:
    """Return the last step after which both ledgers have the same state (0: none), and the first that differs after it.

    None if they have no difference. The states are halved: after one that differs, all differ.
    """
    hashed = [step for step in sorted(left.keys() & right.keys()) if "state" in left[step] and "state" in right[step]]
    differs: Callable[[int], bool] = lambda step: left[step]["state"] != right[step]["state"]  # noqa: E731
    place = bisect_left(hashed, True, key=differs)
    same_at = hashed[place - 1] if place else 0
    difference = first_difference(
        *({step: line for step, line in each.items() if step > same_at} for each in (left, right))
    )
    if difference is None and place == 0 and hashed:
        difference = first_difference(left, right)  # they began otherwise
    return None if difference is None else (same_at, max(1, difference.step))


def print_found(found: Found, options: argparse.Namespace) -> int:
    """Print the result; return the exit code."""
    difference = found.difference
    if options.json:
        print(json.dumps(json.loads(json_text(difference_json(found))), indent=2))
    elif difference is None:
        print(f"no difference: {found.labels[1]} computes the steps {found.first} to {found.last} of {found.labels[0]}")
    else:
        print(printable(f"{found.labels[0]} and {found.labels[1]}: {difference.headline}"))
        if sentence := difference.what_was_the_same:
            print(printable(sentence))
        if found.module is not None:
            print(printable(f"first module: {found.module}"))
        elif found.has_modules:
            print("the outputs of all modules and the gradients of the slots are the same: look at what follows them")
    return SAME if difference is None else DIFFERENT


def difference_json(found: Found) -> dict[str, Any]:
    """Return the result as plain values."""
    difference, module = found.difference, found.module
    return {
        "sides": list(found.labels),
        "computed": [found.first, found.last],
        "step": None if difference is None else difference.step,
        "part": None if difference is None else difference.what,
        "where": None if difference is None else list(difference.where),
        "values": None if difference is None else [difference.left, difference.right],
        "module": None if module is None else (module.left or module.right or {}).get("module"),
        "outputs": None if module is None else [module.left, module.right],
    }
