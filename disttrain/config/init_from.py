"""The fields of `init_from`: the weights with which a new run begins, and the mapping of their names.

    init_from="runs/base@best"                                             # the short form: the path alone
    init_from={"path": "base.safetensors", "rename": {"encoder.": "backbone."}, "skip": ("head.",)}

*Contract*: a pattern without `*`, `?` or `[` means every name that begins with it. The command line takes the short
form too: `init_from=PATH` sets `init_from.path`.
"""

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from disttrain.config.annotations import FieldNote, Flag
from disttrain.config.declaration import Declaration


def _as_text(path: Any) -> Any:
    return os.fspath(path) if isinstance(path, os.PathLike) else path


def _as_patterns(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else patterns


class InitFromConfig(Declaration):
    """The weights with which a new run begins."""

    prefix: ClassVar[str] = "init_from."
    short_form: ClassVar[str] = "path"
    path: Annotated[str | None, BeforeValidator(_as_text), FieldNote(may_change=True)] = None
    """The weights with which a new run begins: RUN, RUN@best, RUN@last or RUN@STEP of a run directory, a folder of
    checkpoints or its URL; or a file, .safetensors or of torch.save. A resumed run does not read it again. None: the
    weights that `model` builds. init_from=PATH is its short form (docs/starting.md)."""
    rename: Annotated[Mapping[str, str], FieldNote(may_change=True)] = Field(default_factory=dict)
    """The beginnings of names there, each with the beginning that takes its place here: {"encoder.": "backbone."}. Of
    several that fit, the longest counts."""
    skip: Annotated[str | tuple[str, ...], AfterValidator(_as_patterns), FieldNote(may_change=True)] = ()
    """Names of this model that are not taken, but begin as `model` builds them: beginnings such as "head.", or patterns
    such as "*.lora_*"."""
    strict: Annotated[Flag, FieldNote(may_change=True)] = True
    """Refuse weights in which a name of this model is missing or has another shape, unless `skip` lists it. False: take
    what fits, and report the rest."""


def from_short_form(given: Any) -> Any:
    """Return the fields that `init_from` stands for: a path alone, or None, gives the path."""
    return {"path": given} if given is None or isinstance(given, str | os.PathLike) else given
