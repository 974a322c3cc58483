"""The first difference of two ledgers: the step, the part of the step that differs first, and its likely cause.

*Contract*: the parts of a step are compared in the order of cause and effect: the choice of samples, the loaded data,
the loss, the gradient, the learning rate, the weights, the optimizer's state, the kept objects, the values beside the
loss, the evaluation after the step. A part that only one of the two lines holds is not compared (hashes are written
every `ledger.every_steps` steps).
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from disttrain.evidence.ledger import Line, differing, shortened

CAUSES = {
    "began": "The two runs did not begin with the same state: the model's factory, or code that it calls, draws from a "
    "source that disttrain does not seed (the clock, os.urandom, a generator of its own).",
    "order": "The samples were not the same: the runs differ in the seed, the number of samples, the global batch or "
    "the version of disttrain.",
    "batch": "The samples were the same, but not the data loaded for them: the dataset or collate draws from a "
    "generator of its own, or depends on the clock, the process, the rank or earlier loads. Draw from the global "
    "generators of python, numpy or torch instead, which are seeded for each microbatch.",
    "loss": "So the forward pass or the loss depends on something else: a generator of its own, the clock, the rank or "
    "number of ranks, state that no checkpoint holds, or a kernel that is not deterministic.",
    "left_out": "One run left this step out after a rollback (on_nan=rollback), because its loss or gradient was bad. "
    "In the other run it was not bad, or the run accepted it.",
    "grad_norm": "The losses were the same, so the backward pass is not deterministic, or a hook changes gradients.",
    "learning_rate": "The schedule depends on more than the number of steps.",
    "model": "The gradient's norm was the same, but not the update: something besides the optimizer changes the "
    "weights or buffers, or the gradients differed but had the same norm.",
    "optimizer": "The weights were the same, but not the optimizer's state.",
    "kept": "The weights and the optimizer's state were the same, but not the state of an object that a handler keeps "
    "with run.keep: its state_dict leaves something out, its load_state_dict does not restore it, or it depends on the "
    "clock, the rank or the number of ranks.",
    "values": "The losses were the same, but not what the training curve holds beside them: a value that the forward "
    "returns, or a metric in train_metrics, depends on something else: a generator of its own, the clock, the rank or "
    "number of ranks, or state that no checkpoint holds.",
    "evaluation": "The weights and the state were the same, so the evaluation depends on something else: validation "
    "data that is not the same, a generator of its own, the clock, the rank or number of ranks, or state that no "
    "checkpoint holds.",
}
"""The likely cause, for each part of a step that can differ first."""

_ComparedPart = tuple[str, str, list[str], tuple[str, str] | None]
"""A compared part: its key in CAUSES, its name, the places that differ, both values (None if they are the same)."""


@dataclass(frozen=True)
class LedgerDifference:
    """The first difference of two ledgers: the step, the part of it, the place in the part, and the two values."""

    step: int
    what: str
    """The part that differs, a key of CAUSES."""
    where: tuple[str, ...]
    """The names of the slots or tensors that differ."""
    left: str
    right: str
    known: tuple[str, ...]
    """The parts of this step that were compared before and are the same."""
    state_same_at: int | None
    """The last earlier step after which the whole state is known to be the same."""

    @property
    def part(self) -> str:
        """The part that differs and the place in it, in words."""
        names = {
            "began": "the state that the runs began with",
            "order": "the choice of samples",
            "batch": "the loaded data",
            "loss": "the loss",
            "left_out": "whether the step was left out",
            "grad_norm": "the gradient's norm",
            "learning_rate": "the learning rate",
            "model": "the weights or buffers after the step",
            "optimizer": "the optimizer's state after the step",
            "kept": "the state of a kept object after the step",
            "values": "the values beside the loss",
            "evaluation": "the results of the evaluation after the step",
        }
        return f"{names[self.what]}{f' ({shortened(self.where, 4)})' if self.where else ''}"

    @property
    def headline(self) -> str:
        """One line with the step, the part, the place and both values."""
        return f"first difference at step {self.step}: {self.part}: {self.left} and {self.right}"

    @property
    def explanation(self) -> str:
        """The parts that were the same, and the likely cause; if the ledgers do not show it, the way to find it."""
        return " ".join([*self._known_sentences(), self._cause])

    @property
    def what_was_the_same(self) -> str:
        """The parts of the step that were compared before, and the last step with the same state; may be empty."""
        return " ".join(self._known_sentences())

    def _known_sentences(self) -> list[str]:
        known = [f"The same in this step: {', '.join(self.known)}."] if self.known else []
        is_state_known = self.state_same_at is not None and self.step > 0
        return known + [f"The state was the same after step {self.state_same_at}."] * is_state_known

    @property
    def _cause(self) -> str:
        cause_is_known = (
            self.what in ("began", "order", "batch")
            or ("the loaded data" in self.known and self.state_same_at == self.step - 1)
            or self.what == "values"
            or (self.what == "evaluation" and "the weights" in self.known)
        )
        if cause_is_known:
            return CAUSES[self.what]
        return (
            "These ledgers hold hashes only every few steps, so they do not show the first cause: run both again "
            "with ledger.every_steps=1, or use `disttrain verify`."
        )


@dataclass(frozen=True)
class Comparison:
    """The comparison of two runs."""

    num_steps: int
    """Steps that both ledgers have."""
    last_steps: tuple[int, int]
    num_hashed: int
    """The number of these steps at which the whole state was compared."""
    configs: tuple[str, ...]
    """The config fields that differ and affect the results, with both values."""
    difference: LedgerDifference | None
    weights: tuple[str | None, str | None]
    """`params_sha256` of each run that has ended, else None."""
    best: tuple[str | None, str | None] = (None, None)
    """The best evaluation of each run that has ended, else None."""
    num_evaluations: tuple[int, int] = (0, 0)
    rounding: tuple[str, ...] = field(default=())
    """Metrics, by evaluation, that differ by no more than rounding on another number of ranks."""

    @property
    def same(self) -> bool:
        """Whether everything that both runs did is the same."""
        ends = () if self.last_steps[0] != self.last_steps[1] else (self.weights, self.best)
        return self.difference is None and all(None in end or end[0] == end[1] for end in ends)


def first_difference(left: Mapping[int, Line], right: Mapping[int, Line]) -> LedgerDifference | None:
    """Return the first difference of two ledgers, or None if all steps that both have are the same."""
    state_same_at = None
    for step in sorted(left.keys() & right.keys()):
        known: list[str] = []
        for key, name, places, values in _compared_parts(step, left[step], right[step]):
            if values is None:
                known.append(name)
                continue
            return LedgerDifference(step, key, tuple(places), *values, tuple(known), state_same_at)
        if "state" in left[step] and "state" in right[step]:
            state_same_at = step
    return None


def _compared_parts(step: int, left: Line, right: Line) -> Iterator[_ComparedPart]:
    """Yield the parts that both lines hold, in the order of cause and effect."""
    if step == 0:
        yield _state_part("began", "the state they began with", "", left, right)
        return
    if "order" in left and "order" in right:
        yield "order", "the choice of samples", [], _values(left["order"], right["order"])
    detailed = "slots" in left and "slots" in right
    if detailed:
        yield _slot_part("batch", "the loaded data", left, right)
    if (reasons := _values(_left_out(left), _left_out(right))) is not None:
        yield "left_out", "whether it was left out", [], reasons
    if detailed:
        part = _slot_part("loss", "the loss of every slot", left, right)
        if part[3] is not None:
            yield part
    yield "loss", "the loss", [], _values(left["loss"], right["loss"])
    yield "grad_norm", "the gradient's norm", [], _values(left["grad_norm"], right["grad_norm"])
    yield "learning_rate", "the learning rate", [], _values(left["learning_rate"], right["learning_rate"])
    if "state" in left and "state" in right:
        yield _state_part("model", "the weights", "model.", left, right)
        yield _state_part("optimizer", "the optimizer's state", "optimizer.", left, right)
        yield _state_part("kept", "the state of kept objects", "kept.", left, right)
    # The last step of a run has metrics of the training data that a longer run does not have at that step.
    common = left.get("values", {}).keys() & right.get("values", {}).keys()
    if common:
        yield _results_part("values", "the values beside the loss", left, right, common)
    if "evaluation" in left and "evaluation" in right:
        names = left["evaluation"].keys() | right["evaluation"].keys()
        yield _results_part("evaluation", "the evaluation", left, right, names)


def _results_part(key: str, name: str, left: Line, right: Line, names: Collection[str]) -> _ComparedPart:
    of_left, of_right = ({each: line[key].get(each) for each in names if each in line[key]} for line in (left, right))
    found = differing(of_left, of_right)
    return key, name, found, (str(of_left.get(found[0])), str(of_right.get(found[0]))) if found else None


def _left_out(line: Line) -> str:
    """Return why the whole step was left out, or "no"; a step that left out its update alone differs in its norm."""
    return "no" if line["loss"] is not None else str(line.get("left_out", "yes"))


def _values(left: Any, right: Any) -> tuple[str, str] | None:
    return None if left == right else (_shown(left), _shown(right))


def _shown(value: Any) -> str:
    """Return a value as text; a hexadecimal float also in decimal form."""
    try:
        return f"{float.fromhex(value)!r} ({value})"
    except (ValueError, TypeError, OverflowError):
        return "none" if value is None else str(value)


def _shown_hash(value: Any) -> str:
    return "none" if value is None else str(value)


def _slot_part(key: str, name: str, left: Line, right: Line) -> _ComparedPart:
    of_left, of_right = (dict(enumerate(line["slots"][key])) for line in (left, right))
    slots = [slot for slot in of_left if of_left[slot] != of_right.get(slot)]
    slots = slots or [slot for slot in of_right if slot not in of_left]
    if not slots:
        return key, name, [], None
    show = _shown if key == "loss" else _shown_hash
    values = show(of_left.get(slots[0])), show(of_right.get(slots[0]))
    return key, name, [f"slot {slot}" for slot in slots], values


def _state_part(key: str, name: str, prefix: str, left: Line, right: Line) -> _ComparedPart:
    of_left, of_right = left["state"], right["state"]
    tensors = [tensor for tensor in differing(of_left, of_right) if tensor.startswith(prefix)]
    if not tensors:
        return key, name, [], None
    return key, name, tensors, (_shown_hash(of_left.get(tensors[0])), _shown_hash(of_right.get(tensors[0])))
