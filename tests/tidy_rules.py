"""The rules of test_tidy.py: each takes the repository's root and returns its violations as "path:line: advice"."""

import ast
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path

from tidy_house import (
    PACKAGE,
    House,
    Target,
    defined,
    imported,
    origin,
    read_house,
    read_module,
    read_tree,
    references,
    top_level,
)

MOST_LINES, MOST_LINES_OF_A_FUNCTION, WIDEST_LINE = 300, 70, 120
RIDDLE = re.compile(r"Return (what|who|whoever)\b|(What|Who|Whoever|Which) ")
USERS = ("examples", "benchmarks")  # folders whose use of a name counts as use
GUIDES = ("docs/architecture.md", "docs/extending.md")  # pages that send a reader to files
FOREIGN = ("runs/", "metrics/", "step-", ".tmp-", "/", "_name")  # paths in a run's directory, or the end of a name
PLACEHOLDER = re.compile(r"(?<![A-Z])(NAME|ROOM)(?![A-Z])")

# Library names that nothing in the package, the docs, the examples or the benchmarks uses, each with its reason.
LIBRARY: Mapping[str, str] = {
    "Member": "a rank's side of recovery in place, which run/ will take up (docs/recovery_protocol.md)",
    "supervised_evaluation_step": "the engine's room exports it: an evaluator's step for an Engine of one's own",
    "supervised_evaluation_step_amp": "the engine's room exports it: an evaluator's step for an Engine of one's own",
    "supervised_training_step_amp": "docs/precision.md names it by its ending",
    "supervised_training_step_apex": "docs/precision.md names it by its ending",
    "supervised_training_step_tpu": "docs/precision.md names it by its ending",
    "reference_markdown": "docs/reference/config.md is written with it; tests/config/test_config_reference.py says how",
}
# Imports that may close a circle: (importing module, imported module) and the reason.
CIRCLES: Mapping[tuple[str, str], str] = {
    ("disttrain.config.checks", "disttrain.config.fields"): "for the type alone; Config calls the checks on itself",
    ("disttrain.config.monitors", "disttrain.config.fields"): "for the type alone; Config calls the checks on itself",
    (
        "disttrain.config.update_checks",
        "disttrain.config.fields",
    ): "for the type alone; Config calls the checks on itself",
}


def _python(root: Path, *folders: str) -> Iterator[tuple[str, str]]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), path.read_text()


def _pages(root: Path, *names: str) -> Iterator[tuple[str, str]]:
    for path in [*(root / name for name in names), *sorted((root / "docs").rglob("*.md"))]:
        if path.exists():
            yield path.relative_to(root).as_posix(), path.read_text()


def long_files(root: Path) -> list[str]:
    """A file of the package has at most 300 lines."""
    lengths = {path: len(text.splitlines()) for path, text in _python(root, PACKAGE)}
    return [
        f"{path}:{MOST_LINES + 1}: the file has {length} lines, at most {MOST_LINES} are allowed; split it"
        for path, length in lengths.items()
        if length > MOST_LINES
    ]


def long_functions(root: Path) -> list[str]:
    """A function of the package, nested ones and methods included, has at most 70 lines; decorators do not count."""
    return [
        f"{path}:{node.lineno}: `{node.name}` has {length} lines, at most {MOST_LINES_OF_A_FUNCTION} are allowed; "
        "move a part of it into a function"
        for path, text in _python(root, PACKAGE)
        for node in read_tree(text)[1]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    ]


def _is_entry(path: str, name: str) -> bool:
    return name == "main" and path.startswith((f"{PACKAGE}/commands/", f"{PACKAGE}/launch.py"))


def repeated_names(root: Path) -> list[str]:
    """A public top-level name is defined in one module of the package only."""
    places = defaultdict(list)
    for module in read_house(root).values():
        for name, line in module.public.items():
            if not _is_entry(module.path, name):
                places[name].append((module.path, line))
    return [
        f"{path}:{line}: `{name}` is also defined in "
        f"{', '.join(f'{p}:{n}' for p, n in found if p != path)}; rename one of them"
        for name, found in sorted(places.items())
        for path, line in found
        if len(found) > 1
    ]


def _uses(root: Path, house: House) -> set[Target]:
    """Return the definitions to which other code of the package, an example or a benchmark refers."""
    used = set()
    for dotted, module in house.items():
        for statement in module.tree.body:
            inner = [statement] if not isinstance(statement, ast.If | ast.Try | ast.With) else top_level([statement])
            own = {(dotted, name) for s in inner for name in defined(s)}
            used |= {target for target in references(house, module, statement, dotted) if target not in own}
    for folder in USERS:
        for path in sorted((root / folder).rglob("*.py")):
            user = read_module(root, path, set(house))
            used |= set(references(house, user, user.tree))
    return used


def _documented_words(root: Path) -> set[str]:
    """Return the names in the Python code of the docs and the README: code blocks, and spans that parse as Python."""
    words: set[str] = set()
    for _, text in _pages(root, "README.md"):
        blocks = re.findall(r"^ *```python\n(.*?)^ *```", text, re.M | re.S)
        for code in blocks + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)):
            try:
                nodes = [*ast.walk(ast.parse(code))]
            except SyntaxError:
                continue
            words |= {n.id for n in nodes if isinstance(n, ast.Name)}
            words |= {n.attr for n in nodes if isinstance(n, ast.Attribute)}
            words |= {n.name for n in nodes if isinstance(n, ast.alias)}
    return words


def unused_names(root: Path, allowed: Mapping[str, str] = LIBRARY) -> list[str]:
    """A public top-level name has a user: other code, an example, a benchmark, or, where a room exports it, the docs.

    Imports, strings in `__all__`, tests and a definition's own body are no users.
    """
    house = read_house(root)
    words = _documented_words(root)
    exports = {origin(house, (dotted, name)) for dotted, m in house.items() if m.is_room for name in m.exported}
    used = _uses(root, house) | {target for target in exports if target[1] in words}
    return [
        f"{module.path}:{line}: nothing but tests uses `{name}`; remove it, or start its name with an underscore"
        for dotted, module in house.items()
        for name, line in module.public.items()
        if (dotted, name) not in used and name not in allowed and not _is_entry(module.path, name)
    ]


def _arrows(house: House, allowed: Mapping[tuple[str, str], str]) -> dict[str, dict[str, int]]:
    """Return the modules that each module imports, with the line; a room's name leads to the module that defines it."""
    arrows: dict[str, dict[str, int]] = {dotted: {} for dotted in house}
    for dotted, module in house.items():
        for node in module.statements:
            targets = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for _, (other, name) in imported(node, set(house)) if isinstance(node, ast.ImportFrom) else ():
                targets.append(origin(house, (other, name))[0] if house[other].is_room else other)
            for target in targets:
                if target in house and (dotted, target) not in allowed:
                    arrows[dotted].setdefault(target, node.lineno)
    return arrows


def _circle(arrows: Mapping[str, Mapping[str, int]], start: str) -> list[str]:
    """Return the shortest way from a module back to itself; nothing if there is none."""
    ways, seen = deque([[start]]), set()
    while ways:
        way = ways.popleft()
        for target in sorted(arrows[way[-1]]):
            if target == start:
                return [*way, start]
            if target not in seen:
                seen.add(target)
                ways.append([*way, target])
    return []


def import_circles(root: Path, allowed: Mapping[tuple[str, str], str] = CIRCLES) -> list[str]:
    """Modules do not import one another in a circle, in functions or for types either; a room's re-exports are none."""
    house = read_house(root)
    arrows = _arrows(house, allowed)
    circles: dict[frozenset[str], list[str]] = {}
    for start in house:
        if way := _circle(arrows, start):
            circles.setdefault(frozenset(way), way)
    return [
        f"{house[way[0]].path}:{arrows[way[0]][way[1]]}: imports in a circle: {' -> '.join(way)}; move the shared part "
        "to a module below"
        for way in circles.values()
    ]


def riddling_docstrings(root: Path) -> list[str]:
    """A docstring's first line names a thing or an action; it does not open with "Return what", "What" or "Who"."""
    return [
        f"{path}:{node.body[0].lineno}: the docstring opens with {opening[0].strip()!r}; name the thing or the action"
        for path, text in _python(root, PACKAGE, "tests", *USERS)
        if RIDDLE.search(text)  # parsing all the tests takes a second
        for tree, inner in [read_tree(text)]
        for node in [tree, *inner]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if (opening := RIDDLE.match(ast.get_docstring(node) or ""))
    ]


def wide_lines(root: Path) -> list[str]:
    """A line of a page for people has at most 120 characters; tables and addresses are no exception."""
    return [
        f"{path}:{number}: the line has {len(line)} characters, at most {WIDEST_LINE} are allowed; break or shorten it"
        for path, text in _pages(root, "README.md", "CHANGELOG.md", "CONTRIBUTING.md")
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > WIDEST_LINE
    ]


def untested_modules(root: Path) -> list[str]:
    """A module `ROOM/name.py` has a test file `tests/ROOM/test_..._name.py`, one of the top `tests/test_name.py`."""
    found = []
    for module in read_house(root).values():
        *room, name = Path(module.path).with_suffix("").parts[1:]
        folder = root.joinpath("tests", *room)
        names = {path.stem for path in (root / PACKAGE).joinpath(*room).glob("*.py")}
        tests = [_without_room(path.stem, room) for path in folder.glob("test_*.py")] if room else []
        tested = any(_module_of(test, names) == name for test in tests)
        tested |= [name] == room and any(_module_of(test, names) == "" for test in tests)  # engine/engine.py
        tested |= "xla" in name and any(name in path.stem for path in (root / "tests/xla").glob("test_*.py"))
        tested |= not room and (folder / f"test_{name}.py").exists()
        if not tested and name not in ("__init__", "__main__"):
            wanted = "/".join(["tests", *room, f"test_{'_'.join([*room, name])}.py"])
            found.append(f"{module.path}:1: no test file has its name; write {wanted}")
    return found


def _without_room(stem: str, room: list[str]) -> str:
    """Return the stem of a test file without `test_` and the name of its room, in the plural or the singular."""
    return re.sub(rf"^({'|'.join(room)}|{'|'.join(room).removesuffix('s')})_", "", stem.removeprefix("test_"))


def _module_of(test: str, names: set[str]) -> str:
    """Return the longest name of a module with which the name of a test file begins; "" if there is none."""
    return max((name for name in names if f"{test}_".startswith(f"{name}_")), key=len, default="")


def repeated_test_files(root: Path) -> list[str]:
    """A test file's basename is unique, since pytest imports test files by basename."""
    places = defaultdict(list)
    for path in sorted((root / "tests").rglob("test_*.py")):
        places[path.name].append(path.relative_to(root).as_posix())
    return [
        f"{path}:1: its basename is that of {', '.join(p for p in paths if p != path)} too; rename one of them"
        for paths in places.values()
        for path in paths
        if len(paths) > 1
    ]


def _repository_path(span: str) -> str:
    """Return the path of the repository that a span in backticks names, up to a placeholder; "" if it names none."""
    path = span.split(":")[0]
    looks_like_one = re.fullmatch(r"[\w.*/-]+", path) and ("/" in path or path.endswith((".py", ".md")))
    if not looks_like_one or path == "cfg.py" or path.startswith(FOREIGN):
        return ""
    return "/".join(takewhile(lambda part: not PLACEHOLDER.search(part), path.rstrip("/").split("/")))


def missing_paths(root: Path) -> list[str]:
    """A path in backticks on a page for newcomers exists: from the root, the package or docs/.

    Files of a user or a run (`cfg.py`, `runs/...`, `step-...`) are not of the repository. Of `disttrain/ROOM/name.py`,
    with a placeholder, only `disttrain` must exist.
    """
    found = []
    for page in GUIDES:
        if not (root / page).exists():
            found.append(f"{page}:1: the page is missing; write it, or take it out of GUIDES in tests/tidy_rules.py")
            continue
        text = re.sub(r"```.*?```", lambda fence: "\n" * fence[0].count("\n"), (root / page).read_text(), flags=re.S)
        for number, line in enumerate(text.splitlines(), 1):
            for span in re.findall(r"`([^`]+)`", line):
                path = _repository_path(span)
                if path and not any(any(place.glob(path)) for place in (root, root / PACKAGE, root / "docs")):
                    found.append(f"{page}:{number}: `{span}` does not exist; name the file that there is now")
    return found


def unlisted_modules(root: Path) -> list[str]:
    """The docstring of a room lists the room's modules, a line for each: "NAME   its purpose"."""
    found = []
    for room in sorted((root / PACKAGE).glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse(room.read_text())) or ""
        listed = {line.split()[0].strip("`") for line in text.splitlines() if line.strip()}
        modules = sorted(path.stem for path in room.parent.glob("*.py") if path.name != "__init__.py")
        found += [
            f"{room.relative_to(root).as_posix()}:1: its docstring has no line that begins with `{name}`; say there "
            "what the module is for"
            for name in modules
            if name not in listed
        ]
    return found


RULES: tuple[Callable[[Path], list[str]], ...] = (
    long_files,
    long_functions,
    repeated_names,
    unused_names,
    import_circles,
    riddling_docstrings,
    wide_lines,
    untested_modules,
    repeated_test_files,
    missing_paths,
    unlisted_modules,
)
