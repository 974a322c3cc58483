"""The table of all fields, for `--help` and for the reference page, made from the declarations themselves.

The page is committed as docs/reference/config.md; a test says how to write it anew when a field changes.
"""

from typing import NamedTuple

from disttrain.config.annotations import Leaf, leaves
from disttrain.config.fields import Config

_INTRO = """\
# Config

A cfg.py is ordinary Python that ends in `config = Config(...)`. These are its fields, made from their
declarations in `disttrain/config/fields.py`. Each can be overridden on the command line as `KEY=VALUE`
(`max_epochs=2`, `checkpoint.keep=5`, `valid_data=none`), and so can each keyword of a function
(`optimizer.lr=3e-4`, `metrics.accuracy.num_classes=10`). The functions themselves are set in the cfg.py.

*On resume*: whether a run that goes on may have another value than it began with.

| field | type | unit | default | on resume | meaning |
|---|---|---|---|---|---|
"""


class FieldRow(NamedTuple):
    """One field as a person reads it."""

    name: str
    type: str
    unit: str
    default: str
    meaning: str


def field_table() -> list[FieldRow]:
    """Return one row a field, in the order of their declaration."""
    return [
        FieldRow(leaf.name, leaf.type_text, leaf.about.unit, _default(leaf), leaf.info.description or "")
        for leaf in leaves(Config)
    ]


def reference_markdown() -> str:
    """Return the reference page of the config."""
    changes = {leaf.name: leaf.about.may_change for leaf in leaves(Config)}
    resume = {name: "may change" if may else "same" for name, may in changes.items()}
    resume |= dict.fromkeys(("max_epochs", "max_steps"), "may change without `schedule`")
    rows = [
        f"| `{row.name}` | {_code(row.type)} | {row.unit} | {_code(row.default)} | {resume[row.name]} | {row.meaning} |"
        for row in field_table()
    ]
    return _INTRO + "\n".join(rows) + "\n"


def _default(leaf: Leaf) -> str:
    if leaf.info.is_required():
        return "required"
    value = leaf.info.get_default(call_default_factory=True)
    if value == ():
        return "[]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _code(text: str) -> str:
    """Return text as code in a cell of a table, where a bar would end the cell."""
    return "required" if text == "required" else f"`{text}`".replace("|", "\\|")
