"""The ledger: what each step of a run computed, so that two runs can be compared bit by bit.

*Contract*: `ledger.jsonl` has one JSON line a step, the same text on any number of ranks and workers and after any
number of kills. Numbers are hexadecimal floats, exact; hashes are those of `hashes.py`.

    step, epoch      counted from 1; a line of step 0 holds the state that the run began with
    order            which samples the global batch holds, in slot order; absent where that is not known
    loss             the mean over the slots; null where the step was left out whole
    grad_norm        2-norm of the whole gradient before clipping; null where the step was left out before
    learning_rate    of the first parameter group, as this step used it
    left_out         why the step's update was left out; absent where it was not
and every `every_steps` steps
    slots            {"batch": [...], "loss": [...]}: for each slot, what its microbatch held and its loss
    state            {name: hash}: parameters, buffers and optimizer state after the step

*Errors*: a DisttrainError on every rank where the ranks' states differ: which step, rank and tensor.

*Cost*: a step adds the gradient's norm (free with grad_clip_norm) and, on rank 0, the hash of its indices; a step with
hashes one pass over the state and a gather. Nothing waits for an accelerator except then. See docs/benchmarks.md.
"""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from disttrain.backend import Backend
from disttrain.engine import Engine, Events
from disttrain.errors import DisttrainError
from disttrain.observe.hashes import batch_hash, tensor_hashes
from disttrain.run_directory import JsonLines

Line = dict[str, Any]


def hex_float(value: float | None) -> str | None:
    """Return the exact text of a number, such as "0x1.8000000000000p+0"; "nan" and "inf" are texts too."""
    return None if value is None else float(value).hex()


class Ledger:
    """Writes the ledger of a run to `path` on rank 0, going on after `step`.

    `state()` gives the tensors to hash, by name, and `whole` all of one of which a rank holds a part; `order(epoch,
    steps)` the indices of the global batches of some steps of an epoch, a row each, both as a `StepBatch` counts them.
    `fetched` takes losses and norms, in batches, after which their lines are written.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        *,
        backend: Backend,
        every_steps: int,
        state: Callable[[], Mapping[str, Tensor]],
        whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        order: Callable[[int, range], Any] | None,
    ) -> None:
        self.backend = backend
        self.every_steps = every_steps
        self._state = state
        self._whole = whole
        self._order = order
        self._lines = JsonLines(path, step) if backend.rank == 0 else None
        self._batches: list[str] = []
        self._pending: list[Line] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.begin)
        engine.add_event_handler(Events.ITERATION_STARTED, self.step_starts)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.step_ends)

    def begin(self, engine: Engine) -> None:
        """Note the state that a run begins with."""
        if engine.state.iteration == 0:
            state = self._agreed_state(0)
            if self._lines is not None:
                self._lines.write({"step": 0, "epoch": 0, "state": state})

    def step_starts(self, engine: Engine) -> None:
        if engine.state.iteration % self.every_steps == 0:
            # Before the step, which may change its batch in place.
            self._batches = [batch_hash(microbatch) for microbatch in engine.state.batch]

    def step_ends(self, engine: Engine) -> None:
        step = engine.state.iteration
        line: Line = {"step": step, "epoch": engine.state.epoch}
        if self._order is not None:
            line["order"] = (engine.state.batch.epoch, engine.state.batch.step)  # for `fetched`, which asks for several
        details: Line = {}
        if step % self.every_steps == 0:
            losses = [hex_float(loss) for loss in self.backend.fetch(engine.state.output)]
            by_rank = self.backend.all_gather((self._batches, losses))
            details["slots"] = {
                "batch": [found for batches, _ in by_rank for found in batches],
                "loss": [loss for _, losses in by_rank for loss in losses],
            }
            details["state"] = self._agreed_state(step)
        if self._lines is not None:
            line.update(loss=None, grad_norm=None, learning_rate=None, **details)
            self._pending.append(line)

    def _agreed_state(self, step: int) -> dict[str, str]:
        """Return the hashes of the state, after looking whether every rank has the same."""
        hashes = tensor_hashes(self._state(), self._whole)
        digest = hashlib.blake2b(repr(hashes).encode(), digest_size=16).hexdigest()
        if len(set(self.backend.all_gather(digest))) > 1:
            by_rank: list[dict[str, str]] = self.backend.all_gather(hashes)
            rank, names = next((r, differing(by_rank[0], h)) for r, h in enumerate(by_rank) if h != by_rank[0])
            raise DisttrainError(
                f"the ranks hold different weights or optimizer states after step {step}: rank {rank} has another "
                f"{some(names)} than rank 0, expected the same on each. Something changes them on some ranks alone: "
                "a handler, a model that asks for its rank, or faulty hardware"
            )
        return hashes

    def fetched(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the lines of the steps whose losses were fetched: `lines` hold each one's numbers."""
        if self._lines is None:
            return
        pending, self._pending = self._pending, []
        if self._order is not None:
            for epoch, group in itertools.groupby(pending, key=lambda line: line["order"][0]):
                some_lines = list(group)
                steps = range(some_lines[0]["order"][1], some_lines[-1]["order"][1] + 1)
                for line, row in zip(some_lines, self._order(epoch, steps), strict=True):
                    line["order"] = hashlib.blake2b(row.astype("<i8").tobytes(), digest_size=8).hexdigest()
        for line, fetched in zip(pending, lines, strict=True):
            for name in ("loss", "grad_norm", "learning_rate"):
                line[name] = hex_float(fetched[name])
            if "left_out" in fetched:
                line["left_out"] = fetched["left_out"]
        self._lines.write(*pending)

    def sync(self) -> None:
        """Flush what was written to the disk."""
        if self._lines is not None:
            self._lines.sync()

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Return the names under which two mappings differ, in the order of the left."""
    names = dict.fromkeys([*left, *right])
    return [name for name in names if left.get(name) != right.get(name)]


def some(names: Sequence[str], limit: int = 3) -> str:
    """Return a list of names as a person reads it, cut short where it is long."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
