"""Counts the lines of a program by one rule, for docs/trainings.md.

A program is its file, and of the local files that it imports the definitions that it uses, and those that they use.
Local are the files of its folder, and for an example also the files that docs pages quote. Lines are counted as
`ruff format` leaves them (120 columns, no magic commas), without blank lines, comments, docstrings and imports. Of
shell commands every line counts that is neither blank nor a comment.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from commands import ROOT

EXAMPLES, PEERS, DOCS = ROOT / "examples", ROOT / "benchmarks" / "peers", ROOT / "docs"
RUFF = Path(sys.executable).with_name("ruff")
FORMAT = ("format", "--isolated", "--line-length", "120", "--config", "format.skip-magic-trailing-comma=true", "-")


class Part(NamedTuple):
    """A statement at the top of a file, or of its block under `if`, `with` and so on."""

    lines: frozenset[int]
    defines: frozenset[str]
    uses: frozenset[str]


class File(NamedTuple):
    """A formatted file: its parts, and the local modules' names that it imports, each with the name there or None."""

    parts: list[Part]
    imports: dict[str, tuple[str, str | None]]


@cache
def quoted_files() -> dict[str, str]:
    """Return the Python files that the docs pages quote, by name."""
    pages = "".join(path.read_text() for path in sorted(DOCS.glob("*.md")))
    return dict(re.findall(r"(?ms)^```python file=([\w.]+)\n(.*?)^```$", pages))


def source_of(folder: Path, name: str) -> str | None:
    """Return the text of a local file; None if there is none of that name."""
    if (folder / name).exists():
        return (folder / name).read_text()
    return quoted_files().get(name) if folder == EXAMPLES else None


@cache
def read(folder: Path, name: str) -> File:
    text = source_of(folder, name)
    assert text is not None, f"{name} is neither in {folder} nor in a docs page"
    done = subprocess.run([RUFF, *FORMAT], input=text, capture_output=True, text=True, check=True)
    tree = ast.parse(done.stdout)
    counted = _counted(tree, done.stdout)
    parts = [
        Part(
            frozenset(counted & set(range(_first_line(node), (node.end_lineno or node.lineno) + 1))),
            frozenset(_defined(node)),
            frozenset(_used(node)),
        )
        for node in tree.body
    ]
    return File(parts, {here: there for here, there in _imports(tree) if source_of(folder, f"{there[0]}.py")})


def _counted(tree: ast.Module, text: str) -> set[int]:
    lines = text.splitlines()
    counted = {n for n, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ):
            counted -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return counted


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def _used(node: ast.AST) -> Iterator[str]:
    """Yield the names that are used, and `module.name` for each attribute of a name."""
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            yield each.id
        elif isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name):
            yield f"{each.value.id}.{each.attr}"


def _imports(tree: ast.Module) -> Iterator[tuple[str, tuple[str, str | None]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, (node.module or "", alias.name)) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name, (alias.name, None)) for alias in node.names)


def lines_of(folder: Path, names: Iterable[str]) -> int:
    """Return the number of lines of a training: of its programs and of what they use elsewhere, each line once."""
    counted: set[tuple[str, int]] = set()
    seen: set[tuple[str, str]] = set()

    def add(name: str, part: Part) -> None:
        counted.update((name, line) for line in part.lines)
        for word in part.uses:
            reach(name, word)

    def reach(name: str, word: str) -> None:
        if (name, word) in seen:
            return
        seen.add((name, word))
        file = read(folder, name)
        first, _, rest = word.partition(".")
        if first in file.imports:
            module, there = file.imports[first]
            if there or rest:
                reach(f"{module}.py", there or rest)
        for part in file.parts:
            if word in part.defines:
                add(name, part)

    for name in names:
        if name.endswith(".py"):
            for part in read(folder, name).parts:
                add(name, part)
        else:
            lines = shell_commands(name).splitlines()
            counted.update((name, n) for n, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    return len(counted)


def shell_commands(page: str) -> str:
    """Return the first shell commands of a docs page."""
    return re.findall(r"(?ms)^```bash\n(.*?)^```$", (DOCS / page).read_text())[0]


if __name__ == "__main__":
    for path in sorted(PEERS.glob("*.py")):
        if source_of(EXAMPLES, path.name):
            print(path.name, *(lines_of(folder, [path.name]) for folder in (EXAMPLES, PEERS)))
