"""Makes the table of all fields, for `--help`, and the reference page, from the declarations of the fields.

The page is docs/reference/config.md. tests/config/test_config_reference.py gives the command that writes it again
after a field has changed.
"""

import textwrap
from typing import NamedTuple

from disttrain.config.annotations import Leaf, leaves
from disttrain.config.fields import Config

_INTRO = """\
# Config

A cfg.py is ordinary Python that ends in `config = Config(...)`. This page lists the fields of `Config`, in the order
of their declarations in `disttrain/config/fields.py` and `groups.py`, from which it is made.

The command line can override each field as `KEY=VALUE`: `max_epochs=2`, `checkpoint.keep=5`, `compile=true`,
`valid_data=none`. It can also override each keyword of a function: `optimizer.lr=3e-4`,
`metrics.accuracy.num_classes=10`. The functions themselves are set in the cfg.py.

*On resume* says whether a resumed run may have another value than the run began with.
"""
_PAGE_WIDTH = 120
_UNITS = {"s": "seconds"}


class FieldRow(NamedTuple):
    """The texts about one field."""

    name: str
    type: str
    unit: str
    default: str
    meaning: str


def field_table() -> list[FieldRow]:
    """Return one row for each field, in the order of the declarations."""
    return [
        FieldRow(leaf.name, leaf.type_text, leaf.note.unit, _default(leaf), " ".join(_meaning(leaf).split()))
        for leaf in leaves(Config)
    ]


def reference_markdown() -> str:
    """Return the reference page of the config."""
    resume = {leaf.name: "may change" if leaf.note.may_change else "stays the same" for leaf in leaves(Config)}
    resume |= dict.fromkeys(("max_epochs", "max_steps"), "may change if there is no `schedule`")
    resume["activation_checkpointing"] = "may change without `compile`"
    return "\n".join([_INTRO, *(_section(row, resume[row.name]) for row in field_table())])


def _section(row: FieldRow, on_resume: str) -> str:
    """Return the section of one field: its meaning, then its type, unit and default."""
    unit = f" *Unit*: {_UNITS.get(row.unit, row.unit)}." if row.unit else ""
    default = "none, the field is required" if row.default == "required" else f"`{row.default}`"
    facts = f"*Type*: `{row.type}`.{unit} *Default*: {default}. *On resume*: {on_resume}."
    return f"## `{row.name}`\n\n{_wrapped(row.meaning)}\n\n{_wrapped(facts)}\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _PAGE_WIDTH, break_long_words=False, break_on_hyphens=False)


def _meaning(leaf: Leaf) -> str:
    return leaf.info.description or ""


def _default(leaf: Leaf) -> str:
    if leaf.info.is_required():
        return "required"
    value = leaf.info.get_default(call_default_factory=True)
    if value == ():
        return "[]"
    return f'"{value}"' if isinstance(value, str) else repr(value)
