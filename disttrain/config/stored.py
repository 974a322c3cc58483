"""The config that a run keeps: writes and reads it, and finds the differences to the config of a resumed run.

*Contract*: `config.json` holds the description of the resolved config, its hash, and the folder from which the cfg.py
imports. `overrides.json` beside it holds the list of overrides. A field may change on resume if its note allows it.
The length of the run may change unless a schedule depends on it, and activation checkpointing unless the model is
compiled: the compiler rounds otherwise when it recomputes.
"""

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from disttrain.config.annotations import leaves
from disttrain.config.describe import JSON, Description, canonical, config_hash, describe
from disttrain.config.fields import Config
from disttrain.errors import ConfigError
from disttrain.files import read_json

NOT_SET = "(not set)"
"""The value of a key that is missing in one of two descriptions."""
RECOMPUTES = "activation_checkpointing"
"""A field that changes the bits of compiled models alone."""
SCHEDULE_KEY = re.compile(r"(updates\.[^.]+\.)?schedule")
"""The key of a schedule in a description."""
MAX_VALUE = 400
"""The longest text of a value that a checkpoint holds as it is."""


class Stored(NamedTuple):
    """The content of `config.json`."""

    fields: Description
    hash: str
    folder: Path | None


class FieldDifference(NamedTuple):
    """One key whose values differ between two descriptions."""

    field: str
    old: JSON
    new: JSON

    def __str__(self) -> str:
        return f"{self.field}: {self.old} in the run, {self.new} now"


def to_json(config: Config) -> str:
    """Return the text of `config.json`."""
    folder = str(config.origin.folder) if config.origin else None
    content = {"fields": describe(config), "hash": config_hash(config), "folder": folder}
    return json.dumps(content, indent=2) + "\n"


def read_stored(file: Path) -> Stored:
    """Return the content of a `config.json`, whose text `to_json` made.

    *Errors*: OSError if the file cannot be read; ConfigError that names it, for any other content.
    """
    try:
        content = read_json(file)
        fields, digest, folder = content["fields"], content["hash"], content["folder"]
        if not isinstance(fields, dict) or not isinstance(digest, str) or not isinstance(folder, str | None):
            raise TypeError("fields, hash and folder are not an object and two texts")
        if folder is not None and "\0" in folder:
            raise ValueError("the folder has a name that no folder can have")
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{file}: expected the JSON that a run writes, got {type(error).__name__}: {error}; "
            "restore the file, or start the cfg.py with --fresh."
        ) from error
    return Stored(fields, digest, Path(folder) if folder else None)


def differences(old: Description, new: Description) -> list[FieldDifference]:
    """Return the differences of two descriptions, in the order of the fields.

    Two cases are no difference: `num_slots` is None in one of them, since the first launch sets it; and a field is
    missing in one of them and has its default in the other, since an older disttrain did not know the field.
    """
    defaults = {
        leaf.name: leaf.info.get_default(call_default_factory=True)
        for leaf in leaves(Config)
        if not leaf.info.is_required()
    }
    changed = []
    for key in dict.fromkeys([*new, *old]):
        before, now = old.get(key, NOT_SET), new.get(key, NOT_SET)
        present = now if key not in old else before
        only_one_has_it = key not in old or key not in new
        is_new_field = only_one_has_it and key in defaults and present == _as_described(defaults[key])
        set_by_launch = key == "num_slots" and None in (before, now)
        if canonical(before) != canonical(now) and not is_new_field and not set_by_launch:
            changed.append(FieldDifference(key, before, now))
    return changed


def blocking_differences(old: Description, new: Description) -> list[FieldDifference]:
    """Return the differences that prevent a resume."""
    changeable = _changeable(old) & _changeable(new)
    return [difference for difference in differences(old, new) if not _is_of(difference.field, changeable)]


def binding_fields(description: Description) -> Description:
    """Return the fields that a resumed run must have too, for the manifest of a checkpoint; a long value as its hash.

    Left out is the name, which a run gets with its directory.
    """
    changeable = _changeable(description) | {"name"}
    return {key: _shortened(value) for key, value in description.items() if not _is_of(key, changeable)}


def _changeable(description: Description) -> set[str]:
    """Return the fields that a resumed run may change."""
    changeable = {leaf.name for leaf in leaves(Config) if leaf.note.may_change}
    schedules = [value for key, value in description.items() if SCHEDULE_KEY.fullmatch(key)]
    if all(value is None for value in schedules):
        changeable |= {"max_epochs", "max_steps"}
    if description.get("compile"):
        changeable -= {RECOMPUTES}
    return changeable


def _is_of(key: str, fields: Collection[str]) -> bool:
    """Return whether a key of a description is one of these fields, or a part of one, as init_from.rename.a is."""
    return key in fields or any(key.startswith(f"{field}.") for field in fields)


def _shortened(value: JSON) -> JSON:
    text = canonical(value)
    return value if len(text) <= MAX_VALUE else f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def differences_that_matter(old: Description, new: Description) -> list[FieldDifference]:
    """Return the differences that may change the result of a step."""
    harmless = {leaf.name for leaf in leaves(Config) if leaf.note.harmless}
    if old.get("compile") or new.get("compile"):
        harmless -= {RECOMPUTES}
    return [difference for difference in differences(old, new) if not _is_of(difference.field, harmless)]


def read_overrides(file: Path) -> list[str]:
    """Return the overrides in a run's `overrides.json`; an empty list if there is no such file.

    *Errors*: ConfigError if the file holds anything but a list of strings.
    """
    if not file.exists():
        return []
    try:
        content = read_json(file)
    except ValueError as error:
        raise ConfigError(f"{file}: expected a JSON list of KEY=VALUE, got no JSON ({error}); restore it.") from error
    if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
        raise ConfigError(f"{file}: expected a JSON list of KEY=VALUE, got {str(content)[:60]}; restore it.")
    return content


def _as_described(default: object) -> JSON:
    """Return a default in the form that a description has: fields that hold functions default to None or empty."""
    return [] if default == () else default  # type: ignore[return-value]  # the other defaults are plain values
