"""The changes between two launches are named, with a diff that is safe to show."""

import hashlib
from typing import Any

import pytest

from disttrain.run.launch_changes import MAX_DIFF_LINES, SHOWN_LINES, LaunchChanges, launch_changes
from disttrain.run.launches import KeptFile, LaunchRecord


def record(texts: dict[str, bytes], **changes: Any) -> LaunchRecord:
    files = {
        name: KeptFile(path=name, size_bytes=len(text), sha256=hashlib.sha256(text).hexdigest(), kept=True)
        for name, text in texts.items()
    }
    return LaunchRecord(step=0, files=files, **changes)


def changes_of(
    old: dict[str, bytes], new: dict[str, bytes], of_old: dict[str, Any] | None = None, of_new: Any = None
) -> LaunchChanges:
    records = record(old, **(of_old or {})), record(new, **(of_new or {}))
    return launch_changes(*records, (old.get, new.get), ("then", "now"))


def test_launches_that_are_alike_have_no_changes() -> None:
    files = {"cfg.py": b"a\n", "modules/nets.py": b"b\n"}
    versions = {"versions": {"torch": "2.9"}}
    assert changes_of(files, files, versions, {"versions": {"torch": "2.9", "rich": "1"}}) == ([], [], False)


def test_each_file_is_named_with_its_lines_and_its_diff() -> None:
    old = {"cfg.py": b"a\nb\nc\nd\n", "modules/gone.py": b"", "modules/nets.py": b"x\n"}
    new = {"cfg.py": b"a\nB\nB2\nc\nd\n", "modules/lib/__init__.py": b"", "modules/nets.py": b"x\ny\n"}
    changes = changes_of(old, new)
    assert changes.facts == [
        *("cfg.py (+2 -1)", "gone.py (not imported now)", "lib/__init__.py (imported now)", "nets.py (+1 -0)"),
    ]
    assert changes.diff == [
        *("--- then/cfg.py", "+++ now/cfg.py", "@@ -1,4 +1,5 @@", " a", "-b", "+B", "+B2", " c", " d"),
        *("--- then/nets.py", "+++ now/nets.py", "@@ -1 +1,2 @@", " x", "+y"),
    ]
    assert changes.may_change_bits


@pytest.mark.parametrize(
    ("old", "new", "fact"),
    [
        ({"versions": {"torch": "2.9"}}, {"versions": {"torch": "2.13"}}, "torch: 2.9 then, 2.13 now"),
        ({"commit": "a" * 40}, {"commit": "b" * 40}, "git commit: aaaaaaaaaaaa then, bbbbbbbbbbbb now"),
        ({}, {"commit": "b" * 40, "dirty": True}, "git commit: none then, bbbbbbbbbbbb with changes now"),
        ({"command": ["a", "b"]}, {"command": ["a"]}, "command: a b then, a now"),
    ],
)
def test_what_else_differs(old: dict[str, Any], new: dict[str, Any], fact: str) -> None:
    changes = changes_of({"cfg.py": b""}, {"cfg.py": b""}, old, new)
    assert (changes.facts, changes.diff) == ([fact], [])
    assert changes.may_change_bits == ("versions" in new)


def test_of_an_older_release_the_cfg_alone_is_compared() -> None:
    old = {"knows_modules": False, "versions": {}}
    changes = changes_of({"cfg.py": b"a"}, {"cfg.py": b"b", "modules/nets.py": b""}, old, {"commit": "b" * 40})
    assert changes.facts == ["cfg.py (+1 -1)"]


def test_content_that_is_not_known_or_too_long_is_named_without_a_diff() -> None:
    long = b"x\n" * (MAX_DIFF_LINES + 1)
    records = record({"cfg.py": b"a", "modules/a.so": b"1"}), record({"cfg.py": long, "modules/a.so": b"2"})
    contents = {"cfg.py": b"a"}, {"cfg.py": long}
    changes = launch_changes(*records, (contents[0].get, contents[1].get), ("in a", "in b"))
    assert changes == (["cfg.py (other content)", "a.so (other content)"], [], True)


def test_a_long_diff_is_cut_and_a_terminal_does_not_act_on_it() -> None:
    lines = [f"{number}\t\x1b[2J{'w' * 500}" for number in range(100)]
    changes = changes_of({"cfg.py": b""}, {"cfg.py": "\n".join(lines).encode()})
    shown = changes.shown("the log")
    assert len(shown) == SHOWN_LINES + 1
    assert shown[-1] == f"... {len(changes.diff) - SHOWN_LINES} more lines: the log"
    assert max(map(len, shown)) <= 200
    assert all(line.isprintable() for line in changes.diff)
    assert changes_of({"cfg.py": b""}, {"cfg.py": b"\xff\n"}).diff[-1] == "+\ufffd"
