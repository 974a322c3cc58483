"""The phrases of this room's error messages: what was expected, what was got, and the names that are near."""

import difflib
import inspect
import reprlib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from disttrain.config.annotations import Leaf, leaves
from disttrain.errors import ConfigError

OTHER_NAMES = {
    "accumulate_grad_batches": "num_slots",
    "amp": "precision",
    "callbacks": "handlers",
    "collate_fn": "collate",
    "dataloader_num_workers": "num_workers",
    "eval_dataset": "valid_data",
    "eval_steps": "validate.every_steps",
    "grad_accumulation_steps": "num_slots",
    "gradient_accumulation_steps": "num_slots",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_clip_val": "grad_clip_norm",
    "limit_train_batches": "max_steps",
    "logging_steps": "log.every_steps",
    "loss_fn": "loss",
    "lr_scheduler": "schedule",
    "max_grad_norm": "grad_clip_norm",
    "metric_for_best_model": "checkpoint.monitor",
    "num_train_epochs": "max_epochs",
    "per_device_train_batch_size": "global_batch_size",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "torch_compile": "compile",
    "train_batch_size": "global_batch_size",
    "train_dataset": "train_data",
    "val_check_interval": "validate.every_steps",
}
"""The names of settings in other frameworks, and the fields that say the same here."""
REMARKS = {
    "num_slots": " The global batch has this many parts; a rank runs its own one by one, and adds up their gradients.",
}
"""What to add where the name of another framework was used, because the field counts something else."""


def got(value: object) -> str:
    """Return a short text for a value: the value itself if it is plain, else its kind."""
    if value is None or isinstance(value, bool | int | float | str):
        return reprlib.repr(value)
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__name__', 'without a name')}"
    if isinstance(value, list | tuple) and all(isinstance(item, bool | int | float | str) for item in value):
        return reprlib.repr(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def either(words: Iterable[object], joint: str = "or") -> str:
    """Join words by commas and "or": `a`, `a or b`, `a, b or c`."""
    *first, last = [str(word) for word in words]
    return f"{', '.join(first)} {joint} {last}" if first else last


def both(words: Iterable[object]) -> str:
    """Join words by commas and "and": `a`, `a and b`, `a, b and c`."""
    return either(words, "and")


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return `; did you mean optimizer.lr?` with the nearest of `words`; an empty text if none is near."""
    if (here := OTHER_NAMES.get(word)) in set(words := list(words)):
        return f"; did you mean {here}?{REMARKS.get(str(here), '')}"
    scores = {known: _nearness(word, known) for known in sorted(set(words))}
    best = max(scores.values(), default=0.0)
    near = [known for known in scores if scores[known] >= max(best - 0.17, 0.6)]
    near.sort(key=lambda known: -scores[known])
    return f"; did you mean {either(near[:3])}?" if near else ""


def _nearness(word: str, known: str) -> float:
    """Return the similarity of two dotted names, from 0 to 1.

    The names are compared part by part. They are also near if their last parts are: `lr` is near `optimizer.lr`.
    """
    parts, known_parts = word.split("."), known.split(".")
    ratios = [difflib.SequenceMatcher(None, a, b).ratio() for a, b in zip(parts, known_parts, strict=False)]
    whole = sum(ratios) / len(ratios) if len(parts) == len(known_parts) and min(ratios) >= 0.6 else 0.0
    tail = difflib.SequenceMatcher(None, parts[-1], known_parts[-1]).ratio()
    return max(whole, 0.9 * tail if tail >= 0.85 else 0.0)


def sentence(text: str) -> str:
    """Return the text with a full stop at its end, unless it ends in "." or "?" already."""
    return text if text.endswith((".", "?")) else f"{text}."


def explain_field_errors(error: ValidationError, model: type[BaseModel], prefix: str) -> str:
    """Return pydantic's errors as text, one line for each problem: field, expected, got, and the nearest name."""
    fields = {leaf.name: leaf for leaf in leaves(model, prefix)}
    found = error.errors(include_url=False)
    # Of a union, a function or a dict of functions, the alternative that fits best has the longest place.
    deepest: dict[Any, int] = {}
    for problem in found:
        deepest[problem["loc"][:1]] = max(deepest.get(problem["loc"][:1], 0), len(problem["loc"]))
    problems = [p for p in found if p["type"] != "callable_type" or len(p["loc"]) in (1, deepest[p["loc"][:1]])]
    lines = [sentence(_line(dict(problem), fields, model, prefix)) for problem in problems]
    return "\n".join(dict.fromkeys(lines))


def _line(problem: dict[str, Any], fields: dict[str, Leaf], model: type[BaseModel], prefix: str) -> str:
    """Return the text of one problem. The ConfigError of a group or of a check is such a text already."""
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    head, *rest = problem["loc"] or ("",)
    name = f"{prefix}{head}"
    if problem["type"] == "extra_forbidden":
        top = [prefix + field for field in model.model_fields]
        return f"{name}: no such field{did_you_mean(name, [*top, *fields])}"
    leaf = fields.get(name)
    if leaf is None:
        group = model.model_fields[str(head)].annotation
        short = f"{leaf.type_text} or " if (leaf := fields.get(f"{name}.{getattr(group, 'short_form', '')}")) else ""
        expected = f"{short}a {getattr(group, '__name__', group)} or a dict of its fields"
    elif leaf.note.takes and rest and "[key]" not in rest and (leaf.note.within or len(rest) > 1):
        expected, name = leaf.note.takes, f"{name}.{rest[-1]}"
    else:
        expected = leaf.type_text
    if problem["type"] == "missing":
        expected = expected.removesuffix(" | None")
        return f"{name}: missing; expected {expected}"
    return f"{name}: expected {expected}, got {got(problem['input'])}"
