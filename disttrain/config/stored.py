"""What a run keeps of its config, and how the config of a resumed run may differ from it.

Contract: `config.json` holds the description of the resolved config, its hash and the folder of the cfg.py's
neighbours; `overrides.json` beside it the list of overrides. A field may change on resume where its
declaration says so, the run's length only where no schedule depends on it.
"""

import json
from pathlib import Path
from typing import NamedTuple

from disttrain.config.annotations import leaves
from disttrain.config.describe import JSON, Description, canonical, config_hash, describe
from disttrain.config.fields import Config
from disttrain.errors import ConfigError

NOT_SET = "(not set)"
"""Stands for the value of a key that only one of two descriptions has."""


class Stored(NamedTuple):
    """What `config.json` holds."""

    fields: Description
    hash: str
    folder: Path | None


class Difference(NamedTuple):
    """One key under which two descriptions differ."""

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


def from_json(text: str, where: str = "config.json") -> Stored:
    """Return what `to_json` was given.

    *Errors*: ConfigError that names `where` for another text.
    """
    try:
        content = json.loads(text)
        fields, digest, folder = dict(content["fields"]), str(content["hash"]), content["folder"]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{where}: expected the JSON that a run writes, got {type(error).__name__}: {error}; "
            "restore the file, or start the cfg.py with --fresh."
        ) from error
    return Stored(fields, digest, Path(folder) if folder else None)


def differences(old: Description, new: Description) -> list[Difference]:
    """Return where two descriptions differ, in the order of the fields.

    No difference: `num_slots` that one of them leaves to the first launch, and a field that one of them does
    not know yet while it has its default in the other, as after an update of disttrain.
    """
    defaults = {
        leaf.name: leaf.info.get_default(call_default_factory=True)
        for leaf in leaves(Config)
        if not leaf.info.is_required()
    }
    found = []
    for key in dict.fromkeys([*new, *old]):
        before, now = old.get(key, NOT_SET), new.get(key, NOT_SET)
        only = now if key not in old else before
        unknown = (key not in old or key not in new) and key in defaults and only == _empty(defaults[key])
        settled = key == "num_slots" and None in (before, now)
        if canonical(before) != canonical(now) and not unknown and not settled:
            found.append(Difference(key, before, now))
    return found


def blocking_differences(old: Description, new: Description) -> list[Difference]:
    """Return the differences with which a run cannot be resumed."""
    changeable = {leaf.name for leaf in leaves(Config) if leaf.about.may_change}
    if old.get("schedule") is None and new.get("schedule") is None:
        changeable |= {"max_epochs", "max_steps"}
    return [each for each in differences(old, new) if each.field not in changeable]


def read_overrides(file: Path) -> list[str]:
    """Return the overrides that a run keeps; none where there is no such file.

    *Errors*: ConfigError where it holds anything but a list of strings.
    """
    if not file.exists():
        return []
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file}: expected a JSON list of KEY=VALUE, got no JSON ({error}); restore it.") from error
    if not isinstance(content, list) or not all(isinstance(each, str) for each in content):
        raise ConfigError(f"{file}: expected a JSON list of KEY=VALUE, got {str(content)[:60]}; restore it.")
    return content


def _empty(default: object) -> JSON:
    """Return a default as a description has it: fields that hold functions are None or empty by default."""
    return [] if default == () else default  # type: ignore[return-value]  # the other defaults are plain values
