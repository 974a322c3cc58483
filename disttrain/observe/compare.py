"""Where two runs part: the first step at which their ledgers differ, and what of that step differs first.

*Contract*: within a step the causes are looked at in the order in which they act: the samples chosen, what was loaded
of them, the loss, the gradient, the learning rate, the weights, the optimizer's state. What only one of two lines
holds (hashes are written every `ledger.every_steps` steps) is not compared.

*Errors*: ConfigError for a folder that holds no run or no ledger, and for ledgers without a step in common.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disttrain.config import from_json
from disttrain.config.stored import differences
from disttrain.errors import ConfigError
from disttrain.observe.ledger import Line, differing, some
from disttrain.run_directory import RunDirectory

HARMLESS = ("num_workers", "backend", "handlers", "checkpoint.", "log.", "ledger.", "validate.", "timeout_s", "name")
"""Fields that do not change what a step computes."""

CAUSES = {
    "began": "The two runs did not begin with the same state: the model's factory, or what it calls, draws from "
    "something that disttrain does not seed (the clock, os.urandom, a generator of its own).",
    "order": "The samples were not the same: another seed, number of samples, global batch or disttrain version.",
    "batch": "The samples were the same, but not what was loaded of them: the dataset or collate draws from a "
    "generator of its own, or depends on the clock, the process, the rank, or what was loaded before. Draw from the "
    "global generators of python, numpy or torch instead, which are seeded for each microbatch.",
    "loss": "So the forward pass or the loss depends on something else: a generator of its own, the clock, the rank or "
    "number of ranks, state that no checkpoint holds, or a kernel that is not deterministic.",
    "left_out": "One run left the step out after it had gone back for it (on_nan=rollback): there the loss or gradient "
    "was bad, and in the other run it was not, or was let be.",
    "grad_norm": "The losses were the same, so the backward pass is not deterministic, or a hook changes gradients.",
    "learning_rate": "The schedule depends on something else than the number of steps.",
    "model": "The gradient's norm was the same, but not the update: something changes the weights or buffers besides "
    "the optimizer, or the gradient differed within the same norm.",
    "optimizer": "The weights were the same, but not the optimizer's state.",
}
"""What it means when this differs first."""


@dataclass(frozen=True)
class Difference:
    """The first difference of two ledgers: at which step, what, where in it, and the two values."""

    step: int
    what: str
    """A key of CAUSES."""
    where: tuple[str, ...]
    """The slots or tensors that differ, by name."""
    left: str
    right: str
    known: tuple[str, ...]
    """What was compared in this step and is the same."""
    state_same_at: int | None
    """The last step before after which the whole state is known to be the same."""

    @property
    def headline(self) -> str:
        """One line: what differs, and where."""
        names = {
            "began": "the state that the runs began with",
            "order": "the choice of samples",
            "batch": "what was loaded",
            "loss": "the loss",
            "left_out": "whether the step was left out",
            "grad_norm": "the gradient's norm",
            "learning_rate": "the learning rate",
            "model": "the weights or buffers after the step",
            "optimizer": "the optimizer's state after the step",
        }
        where = f" ({some(self.where, 4)})" if self.where else ""
        return f"first difference at step {self.step}: {names[self.what]}{where}: {self.left} and {self.right}"

    @property
    def explanation(self) -> str:
        """What that means, and how to find out more where the ledgers do not tell."""
        parts = []
        if self.known:
            parts.append(f"In this step the same: {', '.join(self.known)}.")
        if self.state_same_at is not None and self.step:
            parts.append(f"The state was the same after step {self.state_same_at}.")
        whole = self.what in ("began", "order", "batch") or (
            "what was loaded" in self.known and self.state_same_at == self.step - 1
        )
        if whole:
            parts.append(CAUSES[self.what])
        else:
            parts.append(
                "What came first cannot be told from these ledgers, which hold hashes only every so many steps: "
                "run both again with ledger.every_steps=1, or use `disttrain verify`."
            )
        return " ".join(parts)


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side."""

    num_steps: int
    """Steps that both ledgers have."""
    last_steps: tuple[int, int]
    num_hashed: int
    """Of those, steps whose whole state was compared."""
    configs: tuple[str, ...]
    """The fields in which the configs differ and that matter to what is computed, with both values."""
    difference: Difference | None
    weights: tuple[str | None, str | None]
    """`params_sha256` of each, where it has ended."""
    other: tuple[str, ...] = field(default=())
    """Differences that no ledger line shows, such as a validation metric's."""

    @property
    def same(self) -> bool:
        """Whether all that both runs did is the same."""
        ended_alike = None in self.weights or self.last_steps[0] != self.last_steps[1] or len(set(self.weights)) == 1
        return self.difference is None and ended_alike


def read_ledger(path: Path) -> dict[int, Line]:
    """Return the lines of a ledger by step, up to one that a kill cut short."""
    found: dict[int, Line] = {}
    try:
        with path.open("rb") as file:
            for text in file:
                try:
                    line = json.loads(text)
                    found[line["step"]] = line
                except (ValueError, TypeError, KeyError):
                    break
    except OSError as error:
        raise ConfigError(
            f"expected a run's ledger at {path}, got: {error.strerror}; give the run directory, such as runs/NAME"
        ) from None
    if not found:
        raise ConfigError(f"the ledger {path} has no steps yet; let the run do some")
    return found


def first_difference(left: Mapping[int, Line], right: Mapping[int, Line]) -> Difference | None:
    """Return where two ledgers part, or None if all steps that both have are the same."""
    state_same_at = None
    for step in sorted(left.keys() & right.keys()):
        known: list[str] = []
        for what, name, where, values in _parts(step, left[step], right[step]):
            if values is None:
                known.append(name)
                continue
            return Difference(step, what, tuple(where), *values, tuple(known), state_same_at)
        if "state" in left[step] and "state" in right[step]:
            state_same_at = step
    return None


def _parts(step: int, left: Line, right: Line) -> Iterator[tuple[str, str, list[str], tuple[str, str] | None]]:
    """Yield (what, its name, where, both values or None if they are the same) in the order of cause and effect."""
    if step == 0:
        yield _state_part("began", "the state they began with", "", left, right)
        return
    if "order" in left and "order" in right:
        yield "order", "the choice of samples", [], _values(left["order"], right["order"])
    detailed = "slots" in left and "slots" in right
    if detailed:
        yield _slot_part("batch", "what was loaded", left, right)
    if (found := _values(_left_out(left), _left_out(right))) is not None:
        yield "left_out", "whether it was left out", [], found
    if detailed:
        part = _slot_part("loss", "the loss of every slot", left, right)
        if part[3] is not None:
            yield part
    yield "loss", "the loss", [], _values(left["loss"], right["loss"])
    yield "grad_norm", "the gradient's norm", [], _values(left["grad_norm"], right["grad_norm"])
    yield "learning_rate", "the learning rate", [], _values(left["learning_rate"], right["learning_rate"])
    if "state" in left and "state" in right:
        yield _state_part("model", "the weights", "model.", left, right)
        yield _state_part("optimizer", "the optimizer's state", "", left, right)


def _left_out(line: Line) -> str:
    """Return why a step was left out whole; one whose update alone was left out has a loss, and is told by its norm."""
    return "no" if line["loss"] is not None else str(line.get("left_out", "yes"))


def _values(left: Any, right: Any) -> tuple[str, str] | None:
    return None if left == right else (_shown(left), _shown(right))


def _shown(value: Any) -> str:
    """Return a value as text; of a hexadecimal float also its decimal form."""
    try:
        return f"{float.fromhex(value)!r} ({value})"
    except (ValueError, TypeError):
        return "none" if value is None else str(value)


def _hash(value: Any) -> str:
    return "none" if value is None else str(value)


def _slot_part(what: str, name: str, left: Line, right: Line) -> tuple[str, str, list[str], tuple[str, str] | None]:
    mine, theirs = (dict(enumerate(line["slots"][what])) for line in (left, right))
    slots = [slot for slot in mine if mine[slot] != theirs.get(slot)] or [s for s in theirs if s not in mine]
    if not slots:
        return what, name, [], None
    show = _shown if what == "loss" else _hash
    return what, name, [f"slot {slot}" for slot in slots], (show(mine.get(slots[0])), show(theirs.get(slots[0])))


def _state_part(
    what: str, name: str, prefix: str, left: Line, right: Line
) -> tuple[str, str, list[str], tuple[str, str] | None]:
    mine, theirs = left["state"], right["state"]
    names = [found for found in differing(mine, theirs) if found.startswith(prefix)]
    if not names:
        return what, name, [], None
    return what, name, names, (_hash(mine.get(names[0])), _hash(theirs.get(names[0])))


def compare_runs(left: RunDirectory, right: RunDirectory) -> Comparison:
    """Compare two finished or broken runs, by their configs, ledgers and results."""
    ledgers = [read_ledger(run.ledger_jsonl) for run in (left, right)]
    common = ledgers[0].keys() & ledgers[1].keys()
    if not common - {0}:
        raise ConfigError(
            f"the ledgers of {left.path} and {right.path} have no step in common; let both runs do the same steps"
        )
    results = [run.result() or {} for run in (left, right)]
    other = []
    metrics = [result.get("metrics", {}) for result in results]
    if results[0].get("step") == results[1].get("step") and all(metrics):
        other = [f"validation {n}: {metrics[0].get(n)} and {metrics[1].get(n)}" for n in differing(*metrics)]
    return Comparison(
        num_steps=len(common - {0}),
        last_steps=(max(ledgers[0]), max(ledgers[1])),
        num_hashed=sum("state" in ledgers[0][step] and "state" in ledgers[1][step] for step in common),
        configs=tuple(_config_differences(left, right)),
        difference=first_difference(*ledgers),
        weights=(results[0].get("params_sha256"), results[1].get("params_sha256")),
        other=tuple(other),
    )


def _config_differences(left: RunDirectory, right: RunDirectory) -> list[str]:
    stored = []
    for run in (left, right):
        try:
            stored.append(from_json(run.config_json.read_text(encoding="utf-8"), str(run.config_json)).fields)
        except OSError as error:
            raise ConfigError(
                f"expected a run directory, got {run.path}, whose config.json cannot be read ({error.strerror}); "
                "give one such as runs/NAME"
            ) from None
    return [f"{d.field}: {d.old} and {d.new}" for d in differences(*stored) if not d.field.startswith(HARMLESS)]
