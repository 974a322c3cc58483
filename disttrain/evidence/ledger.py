"""The ledger: a record of the results of every step, with which two runs can be compared bit by bit.

*Contract*: `ledger.jsonl` has one JSON line a step. Its text is the same on any number of ranks and workers and after
any number of kills. Numbers are exact, as hexadecimal floats. Hashes are those of `hashes.py`.

    step, epoch      counted from 1; a line of step 0 holds the state with which the run began
    order            hash of the indices of the global batch's samples, in slot order; absent if they are not known
    loss             the mean over the slots; null if the whole step was left out
    grad_norm        2-norm of the whole gradient before clipping; null if the step was left out before it was known
    learning_rate    of the first parameter group, as this step used it
    left_out         the reason why the step's update was left out; absent if it was not
and every `every_steps` steps
    slots            {"batch": [...], "loss": [...]}: for each slot, the hash of its microbatch and its loss
    state            {name: hash}: parameters, buffers, optimizer state and kept objects after the step

*Errors*: a DisttrainError on every rank if the ranks' states differ. It names the step, the rank and the tensors.

*Cost*: every step adds the gradient's norm (free with grad_clip_norm) and, on rank 0, the hash of the indices. A step
with hashes also adds one pass over the state and a gather, and only then waits for an accelerator. See
docs/benchmarks.md.
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
from disttrain.evidence.hashes import batch_hash, tensor_hashes
from disttrain.files import JsonLines

Line = dict[str, Any]


def hex_float(value: float | None) -> str | None:
    """Return the exact text of a number, such as "0x1.8000000000000p+0", "nan" or "inf"."""
    return None if value is None else float(value).hex()


class Ledger:
    """Writes the ledger of a run to `path` on rank 0. In an existing ledger it keeps the lines up to `step`.

    `state()` returns the tensors to hash, by name. `whole` returns the full tensor where a rank holds a part of it.
    `order(epoch, steps)` returns the sample indices of the global batches of some steps of an epoch, one row a step;
    `epoch` and `steps` are counted as in a `StepBatch`. The lines of steps are written when `fetched` gets their losses
    and norms.
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
        """Write the line of step 0, with the state with which a run begins."""
        if engine.state.iteration == 0:
            state = self._agreed_state(0)
            if self._lines is not None:
                self._lines.write({"step": 0, "epoch": 0, "state": state})

    def step_starts(self, engine: Engine) -> None:
        if engine.state.iteration % self.every_steps == 0:
            # Hashed before the step, which may change its batch in place.
            self._batches = [batch_hash(microbatch) for microbatch in engine.state.batch]

    def step_ends(self, engine: Engine) -> None:
        step = engine.state.iteration
        line: Line = {"step": step, "epoch": engine.state.epoch}
        if self._order is not None:
            line["order"] = (engine.state.batch.epoch, engine.state.batch.step)  # `fetched` replaces it by the hash
        details: Line = {}
        if step % self.every_steps == 0:
            losses = [hex_float(loss) for loss in self.backend.fetch(engine.state.output)]
            by_rank = self.backend.all_gather((self._batches, losses))
            details["slots"] = {
                "batch": [microbatch_hash for hashes, _ in by_rank for microbatch_hash in hashes],
                "loss": [loss for _, losses in by_rank for loss in losses],
            }
            details["state"] = self._agreed_state(step)
        if self._lines is not None:
            line.update(loss=None, grad_norm=None, learning_rate=None, **details)
            self._pending.append(line)

    def _agreed_state(self, step: int) -> dict[str, str]:
        """Return the hashes of the state; DisttrainError if the ranks' hashes differ."""
        hashes = tensor_hashes(self._state(), self._whole)
        digest = hashlib.blake2b(repr(hashes).encode(), digest_size=16).hexdigest()
        if len(set(self.backend.all_gather(digest))) > 1:
            by_rank: list[dict[str, str]] = self.backend.all_gather(hashes)
            rank = next(rank for rank, theirs in enumerate(by_rank) if theirs != by_rank[0])
            raise DisttrainError(
                f"the ranks hold different weights or optimizer states after step {step}: rank {rank} has another "
                f"{shortened(differing(by_rank[0], by_rank[rank]))} than rank 0, expected the same on each; look for a "
                "handler or a model that depends on the rank, or for faulty hardware"
            )
        return hashes

    def fetched(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Write the lines of the steps whose losses were fetched; `lines` holds the numbers of each step."""
        if self._lines is None:
            return
        pending, self._pending = self._pending, []
        if self._order is not None:
            for epoch, group in itertools.groupby(pending, key=lambda line: line["order"][0]):
                of_epoch = list(group)
                steps = range(of_epoch[0]["order"][1], of_epoch[-1]["order"][1] + 1)
                for line, indices in zip(of_epoch, self._order(epoch, steps), strict=True):
                    line["order"] = hashlib.blake2b(indices.astype("<i8").tobytes(), digest_size=8).hexdigest()
        for line, fetched in zip(pending, lines, strict=True):
            for name in ("loss", "grad_norm", "learning_rate"):
                line[name] = hex_float(fetched[name])
            if "left_out" in fetched:
                line["left_out"] = fetched["left_out"]
        self._lines.write(*pending)

    @property
    def newest(self) -> Line:
        """The line that was written last, on rank 0; empty before the first."""
        return {} if self._lines is None else self._lines.last

    def sync(self) -> None:
        """Flush the written lines to the disk."""
        if self._lines is not None:
            self._lines.sync()

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def differing(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Return the names whose values differ in two mappings, in the order of the left one."""
    names = dict.fromkeys([*left, *right])
    return [name for name in names if left.get(name) != right.get(name)]


def shortened(names: Sequence[str], limit: int = 3) -> str:
    """Return the first `limit` names as text, and the number of the others."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
