"""Pairs the names of stored weights with those of a model: renamed by their beginnings, some of them left alone.

*Contract*: a pure function of names. Each name of the model is in one of `taken`, `skipped` and `missing`; each stored
name is in `taken`, in `left_over`, or belongs to a skipped one.

*Errors*: ConfigError for a beginning in `rename` that no stored name has, and for two stored names that become one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from disttrain.errors import ConfigError
from disttrain.evidence.ledger import shortened

_WILD = frozenset("*?[")


class NamePairs(NamedTuple):
    """The names of a model's tensors and of stored ones, as they belong together."""

    taken: dict[str, str]
    """For each name of the model that is found its stored name."""
    skipped: list[str]
    """Names of the model that are not to be taken."""
    missing: list[str]
    """Names of the model that no stored name gives."""
    left_over: list[str]
    """Stored names that nothing takes, though they are not skipped."""


def pair_names(
    stored: Iterable[str], wanted: Sequence[str], rename: Mapping[str, str], skip: Sequence[str]
) -> NamePairs:
    """Return the pairs of the names `stored` and the names `wanted` of a model."""
    stored = list(stored)
    for beginning in rename:
        if not any(name.startswith(beginning) for name in stored):
            raise ConfigError(
                f"init_from.rename: expected the beginning of a name that is there, got {beginning!r}; the names are "
                f"{shortened(stored, 6)}"
            )
    by_name: dict[str, str] = {}
    for name in stored:
        here = renamed(name, rename)
        if here in by_name:
            raise ConfigError(
                f"init_from.rename: {by_name[here]} and {name} both become {here}; expected names that stay different"
            )
        by_name[here] = name
    skipped = [name for name in wanted if is_listed(name, skip)]
    rest = [name for name in wanted if not is_listed(name, skip)]
    taken = {name: by_name[name] for name in rest if name in by_name}
    left_over = [name for here, name in by_name.items() if here not in taken and not is_listed(here, skip)]
    return NamePairs(taken, skipped, [name for name in rest if name not in by_name], left_over)


def renamed(name: str, rename: Mapping[str, str]) -> str:
    """Return a stored name as it is here: its longest beginning in `rename` is replaced."""
    fitting = [beginning for beginning in rename if name.startswith(beginning)]
    longest = max(fitting, key=len, default="")
    return rename[longest] + name[len(longest) :] if fitting else name


def is_listed(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name fits a pattern; one without `*`, `?` and `[` fits every name that begins with it."""
    return any(fnmatchcase(name, pattern) if _WILD & set(pattern) else name.startswith(pattern) for pattern in patterns)


class Renaming(NamedTuple):
    """A renaming, and the number of missing names that are found by it."""

    rename: dict[str, str]
    num_found: int


def renaming_that_fits(missing: Sequence[str], left_over: Sequence[str]) -> Renaming | None:
    """Return the renaming of a beginning by which most missing names are found among those left over; None without one.

    Such as that of a base model whose names lie under the "transformer." of one with a head, or the other way round.
    """
    here, there = set(missing), set(left_over)
    pairs: Counter[tuple[str, str]] = Counter()
    for longer, shorter, is_here in ((here, there, True), (there, here, False)):
        for name in longer:
            dot = -1
            while (dot := name.find(".", dot + 1)) >= 0:
                if name[dot + 1 :] in shorter:
                    beginning = name[: dot + 1]
                    pairs[("", beginning) if is_here else (beginning, "")] += 1
    if not pairs:
        return None
    best = min(pairs, key=lambda pair: (-pairs[pair], pair))
    return Renaming({best[0]: best[1]}, pairs[best])
