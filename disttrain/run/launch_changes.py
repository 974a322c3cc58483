"""The differences of two launches: in their files, with a unified diff, in versions, git commit and command."""

import difflib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from disttrain.files import printable
from disttrain.run.launches import LaunchRecord

SHOWN_LINES = 24
"""Lines of a diff that are shown on the screen."""
MAX_DIFF_LINES = 20_000
"""Files with more lines are not compared line by line: that takes long."""
MAX_WIDTH = 200

Contents = Callable[[str], bytes | None]
"""Returns the content of a file of a launch by its kept name; None if it is not known."""


class LaunchChanges(NamedTuple):
    """The differences between two launches."""

    facts: list[str]
    """One short text for each file, version, commit and command that differs."""
    diff: list[str]
    """The lines of the unified diffs of all files."""
    may_change_bits: bool
    """Whether files or versions differ, and not the commit or the command alone."""

    def shown(self, where_all_is: str) -> list[str]:
        """Return the first lines of the diff for a screen, and where to find the others."""
        lines = [line[:MAX_WIDTH] for line in self.diff[:SHOWN_LINES]]
        num_more = len(self.diff) - len(lines)
        return lines + ([f"... {num_more} more lines: {where_all_is}"] if num_more else [])


def launch_changes(
    old: LaunchRecord, new: LaunchRecord, contents: tuple[Contents, Contents], names: tuple[str, str]
) -> LaunchChanges:
    """Return the changes from `old` to `new`; `names` are those of the two launches in the diff and the texts."""
    facts, diff = [], []
    for name in sorted({*old.files, *new.files}):
        before, after = old.files.get(name), new.files.get(name)
        shown = name.removeprefix("modules/")
        if name != "cfg.py" and not (old.knows_modules and new.knows_modules):
            continue
        if before is None or after is None:
            facts.append(f"{shown} ({'imported' if before is None else 'not imported'} {names[1]})")
        elif before.sha256 != after.sha256 or before.size_bytes != after.size_bytes:
            lines = list(
                _unified(
                    contents[0](name), contents[1](name), [f"{place.removeprefix('in ')}/{shown}" for place in names]
                )
            )
            counts = [sum(line.startswith(sign) for line in lines[2:]) for sign in "+-"]
            facts.append(f"{shown} (+{counts[0]} -{counts[1]})" if lines else f"{shown} (other content)")
            diff += lines
    for name in sorted(old.versions.keys() & new.versions.keys()):
        facts += _fact(name, old.versions[name], new.versions[name], names)
    may_change_bits = bool(facts)
    if old.knows_modules and new.knows_modules:
        facts += _fact("git commit", old.git or "none", new.git or "none", names)
        if old.command and new.command:
            facts += _fact("command", " ".join(old.command), " ".join(new.command), names)
    return LaunchChanges([printable(fact) for fact in facts], diff, may_change_bits)


def _fact(name: str, old: Any, new: Any, names: tuple[str, str]) -> Iterator[str]:
    if old != new:
        yield f"{name}: {str(old)[:MAX_WIDTH]} {names[0]}, {str(new)[:MAX_WIDTH]} {names[1]}"


def _unified(old: bytes | None, new: bytes | None, names: list[str]) -> Iterator[str]:
    """Yield the lines of the diff of two texts; none if one is not known, or too long."""
    if old is None or new is None:
        return
    before, after = (text.decode(errors="replace").expandtabs().splitlines() for text in (old, new))
    if max(len(before), len(after)) > MAX_DIFF_LINES:
        return
    for line in difflib.unified_diff(before, after, names[0], names[1], lineterm="", n=2):
        yield printable(line)
