"""The repository keeps the house rules of tidy_rules.py, and each rule finds a violation that is planted for it."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from tidy_house import read_house
from tidy_rules import (
    CIRCLES,
    LIBRARY,
    RULES,
    import_circles,
    long_files,
    long_functions,
    missing_paths,
    repeated_names,
    repeated_test_files,
    riddling_docstrings,
    unlisted_modules,
    untested_modules,
    unused_names,
    wide_lines,
)

ROOT = Path(__file__).parents[1]
Rule = Callable[[Path], list[str]]
Tree = Mapping[str, str]  # the text of each file of a small repository

ROOM = "from disttrain.room.a import A\n\n__all__ = ['A']\n"
WIDE = "x" * 121

# (rule, a tree that breaks it, the start of what the rule says)
VIOLATIONS: list[tuple[Rule, Tree, str]] = [
    (long_files, {"disttrain/a.py": "x = 1\n" * 301}, "disttrain/a.py:301: the file has 301 lines"),
    (long_functions, {"disttrain/a.py": "def f():\n" + "    x\n" * 70}, "disttrain/a.py:1: `f` has 71 lines"),
    (
        long_functions,
        {"disttrain/a.py": "class A:\n    @staticmethod\n    async def f():\n" + "        x\n" * 70},
        "disttrain/a.py:3: `f` has 71 lines",
    ),
    (
        repeated_names,
        {"disttrain/a.py": "class A: ...\n", "disttrain/room/b.py": "\nA = int\n"},
        "disttrain/a.py:1: `A` is also defined in disttrain/room/b.py:2",
    ),
    (
        repeated_names,
        {"disttrain/a.py": "OK, WRONG = 0, 1\n", "disttrain/b.py": "if 1:\n    WRONG: int = 2\n"},
        "disttrain/b.py:2: `WRONG` is also defined in disttrain/a.py:1",
    ),
    (
        repeated_names,
        {"disttrain/run/a.py": "def main(): ...\n", "disttrain/commands/b.py": "", "disttrain/b.py": "main = 1\n"},
        "disttrain/run/a.py:1: `main` is also defined in disttrain/b.py:1",
    ),
    (unused_names, {"disttrain/a.py": "def f(n):\n    return f(n - 1)\n"}, "disttrain/a.py:1: nothing but tests uses"),
    (
        unused_names,  # an export is no use, nor is a test, nor a local variable of the same name
        {
            "disttrain/room/__init__.py": ROOM,
            "disttrain/room/a.py": "class A: ...\ndef _f(A):\n    return A\n_x = [A for A in _f(1)]\n",
            "tests/test_a.py": "from disttrain.room import A\n\nA()\n",
            "docs/page.md": "A sentence with A, and `python A B`.\n```bash\necho `A`\n```\n",
        },
        "disttrain/room/a.py:1: nothing but tests uses `A`",
    ),
    (
        unused_names,  # the docs are no users of what no room exports
        {"disttrain/a.py": "class A: ...\n", "README.md": "`A`\n"},
        "disttrain/a.py:1: nothing but tests uses `A`",
    ),
    (
        import_circles,
        {"disttrain/a.py": "import disttrain.b\n", "disttrain/b.py": "\ndef f():\n    from disttrain.a import x\n"},
        "disttrain/a.py:1: imports in a circle: disttrain.a -> disttrain.b -> disttrain.a",
    ),
    (
        import_circles,  # for types alone, and by way of a room
        {
            "disttrain/room/__init__.py": ROOM,
            "disttrain/room/a.py": "from disttrain.room.b import B\n\nclass A: ...\n",
            "disttrain/room/b.py": "if TYPE_CHECKING:\n    from disttrain.room import A\n\nclass B: ...\n",
        },
        "disttrain/room/a.py:1: imports in a circle: disttrain.room.a -> disttrain.room.b -> disttrain.room.a",
    ),
    (
        riddling_docstrings,
        {"disttrain/a.py": '"""What it is."""\n'},
        "disttrain/a.py:1: the docstring opens with 'What'",
    ),
    (
        riddling_docstrings,
        {"tests/test_a.py": 'class A:\n    def f(self):\n        """Return whoever came."""\n'},
        "tests/test_a.py:3: the docstring opens with 'Return whoever'",
    ),
    (wide_lines, {"docs/part/page.md": f"\n| {WIDE} |\n"}, "docs/part/page.md:2: the line has 125 characters"),
    (wide_lines, {"README.md": f"https://{WIDE[8:]}\n"}, "README.md:1: the line has 121 characters"),
    (
        untested_modules,
        {"disttrain/room/a.py": "", "tests/room/test_data.py": ""},
        "disttrain/room/a.py:1: no test file",
    ),
    (untested_modules, {"disttrain/room/a.py": "", "tests/test_room_a.py": ""}, "disttrain/room/a.py:1: no test file"),
    (untested_modules, {"disttrain/a.py": "", "tests/room/test_a.py": ""}, "disttrain/a.py:1: no test file"),
    (
        untested_modules,  # a longer name
        {"disttrain/run/state.py": "", "tests/run/test_run_handler_state.py": ""},
        "disttrain/run/state.py:1: no test file",
    ),
    (
        untested_modules,  # the name of another module that begins alike
        {"disttrain/room/a.py": "", "disttrain/room/a_b.py": "", "tests/room/test_room_a_b.py": ""},
        "disttrain/room/a.py:1: no test file",
    ),
    (untested_modules, {"disttrain/a.py": "", "tests/test_room_a.py": ""}, "disttrain/a.py:1: no test file"),
    (
        untested_modules,
        {"disttrain/room/xla_b.py": "", "tests/xla/test_xla_a.py": ""},
        "disttrain/room/xla_b.py:1: no test file",
    ),
    (
        untested_modules,
        {"disttrain/room/a.py": "", "tests/xla/test_xla_a.py": ""},
        "disttrain/room/a.py:1: no test file",
    ),
    (
        repeated_test_files,
        {"tests/a/test_x.py": "", "tests/b/test_x.py": ""},
        "tests/a/test_x.py:1: its basename is that of tests/b/test_x.py too",
    ),
    (
        missing_paths,
        {"docs/extending.md": "\nSee `room/gone.py`.\n"},
        "docs/extending.md:2: `room/gone.py` does not exist",
    ),
    (missing_paths, {"docs/extending.md": "See `gone/`.\n"}, "docs/extending.md:1: `gone/` does not exist"),
    (missing_paths, {"docs/architecture.md": "See `gone.md`.\n"}, "docs/architecture.md:1: `gone.md` does not exist"),
    (
        missing_paths,
        {"docs/extending.md": "See `gone/NAME.py`.\n"},
        "docs/extending.md:1: `gone/NAME.py` does not exist",
    ),
    (
        missing_paths,  # after a fence, which is not read
        {"docs/extending.md": "```\nx\n```\n`gone.py`\n"},
        "docs/extending.md:4: `gone.py` does not exist",
    ),
    (missing_paths, {"docs/page.md": ""}, "docs/extending.md:1: the page is missing"),
    (
        unlisted_modules,  # a name elsewhere in the text does not list it
        {
            "disttrain/room/__init__.py": '"""Holds b.\n\na  does A\n"""\n',
            "disttrain/room/a.py": "",
            "disttrain/room/b.py": "",
        },
        "disttrain/room/__init__.py:1: its docstring has no line that begins with `b`",
    ),
]

# (rule, a tree that nearly breaks it)
NEAR_MISSES: list[tuple[Rule, Tree]] = [
    (long_files, {"disttrain/a.py": "x = 1\n" * 300, "tests/test_a.py": "x = 1\n" * 301}),
    (
        long_functions,
        {"disttrain/a.py": "@cache\ndef f():\n" + "    x\n" * 69, "tests/t.py": "def f():\n" + "    x\n" * 99},
    ),
    (
        repeated_names,  # private, local, imported, overloaded, a type variable, a logger, the door of a command
        {
            "disttrain/launch.py": "def main(): ...\n",
            "disttrain/commands/a.py": "T = TypeVar('T')\nlogger = 1\n_p = 1\nclass A: ...\ndef main(): ...\n",
            "disttrain/commands/b.py": "T = typing.TypeVar('T')\nlogger = 1\n_p = 1\n"
            "from disttrain.commands.a import A\ndef main():\n    class A: ...\n"
            "@overload\ndef f(): ...\ndef f(): ...\n",
        },
    ),
    (
        unused_names,
        {
            "disttrain/a.py": "class A: ...\nclass B: ...\nC = 1\ndef _f(a: 'A') -> 'list[B]':\n    return C.x\n",
            "disttrain/b.py": "def f(): ...\ndef g(): ...\ndef h(f=f): ...\n_x = [g for g in h()]\n",
            "disttrain/c.py": "import disttrain.b\nfrom disttrain import b as other\nother.h, disttrain.b.g\n",
            "disttrain/commands/d.py": "def main(): ...\n",
        },
    ),
    (
        unused_names,  # a room's export that the docs, an example or a benchmark uses
        {
            "disttrain/room/__init__.py": "from disttrain.room.a import A, B, C\n\n__all__ = ['A', 'B', 'C']\n",
            "disttrain/room/a.py": "class A: ...\nclass B: ...\nclass C: ...\n",
            "docs/page.md": "```python\nfrom disttrain.room import A\n```\n",
            "README.md": "Call `B(1, 2)`.\n",
            "examples/c.py": "from disttrain.room import C\n\nC()\n",
        },
    ),
    (
        unused_names,  # in the room's namespace a function hides the file of its name
        {
            "disttrain/room/__init__.py": "from disttrain.room.a import a\n",
            "disttrain/room/a.py": "def a(): ...\n",
            "disttrain/b.py": "from disttrain.room import a\n\na()\n",
        },
    ),
    (
        import_circles,  # a room's __init__ imports a.py, and a.py imports from the room what b.py defines
        {
            "disttrain/room/__init__.py": "from disttrain.room.a import A\nfrom disttrain.room.b import B\n",
            "disttrain/room/a.py": "from disttrain.room import B\n\nclass A: ...\n",
            "disttrain/room/b.py": "class B: ...\n",
        },
    ),
    (
        import_circles,
        {"disttrain/config/checks.py": "import disttrain.config.fields", "disttrain/config/fields.py": ""},
    ),
    (
        import_circles,
        {
            "disttrain/config/__init__.py": "",
            "disttrain/config/checks.py": "from disttrain.config.fields import Config\n",
            "disttrain/config/fields.py": "from disttrain.config import checks\n\nclass Config: ...\n",
        },
    ),
    (
        riddling_docstrings,
        {
            "examples/a.py": '"""Return whole files."""',
            "disttrain/a.py": '"""WHAT it is.\n\nWhat more."""\n# What\nWHY = """What it says."""\n',
            "docs/a.py": '"""What """',
        },
    ),
    (wide_lines, {"docs/page.md": "é" * 120 + "\n", "docs/data.txt": WIDE, "SECURITY.md": WIDE}),
    (
        untested_modules,
        {
            "disttrain/__main__.py": "",
            "disttrain/room/__init__.py": "",
            "disttrain/top.py": "",
            "tests/test_top.py": "",
            "disttrain/room/a.py": "",
            "tests/room/test_room_a.py": "",
            "disttrain/room/b.py": "",
            "tests/room/test_b_over_ranks.py": "",
            "disttrain/room/xla.py": "",
            "tests/xla/test_xla_runs.py": "",
        },
    ),
    (repeated_test_files, {"tests/a/test_x.py": "", "tests/b/x.py": "", "tests/a/x.py": "", "tests/b/test_x_y.py": ""}),
    (
        missing_paths,
        {
            "docs/architecture.md": "`room/`, `room/a.py:f`, `page.md`, `tests/**/test_*.py`, `gone`, `a / b`\n",
            "docs/extending.md": "`cfg.py`, `runs/x/`, `disttrain/ROOM/b.py`, `room/x_NAME.py`\n```\n`gone.py`\n```\n",
            "docs/page.md": "`gone.py`\n",
            "disttrain/room/a.py": "",
            "tests/room/test_a.py": "",
        },
    ),
    (
        unlisted_modules,
        {
            "disttrain/room/__init__.py": '"""Room.\n\n    a  does A\n"""\n',
            "disttrain/room/a.py": "",
            "disttrain/b.py": "",
        },
    ),
]


def plant(root: Path, tree: Tree) -> Path:
    for name, text in {"disttrain/__init__.py": "", **tree}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_repository_keeps_the_rule(rule: Rule) -> None:
    violations = rule(ROOT)
    assert not violations, "\n".join([f"{rule.__name__}: {rule.__doc__}", *violations])


@pytest.mark.parametrize(("rule", "tree", "start"), VIOLATIONS, ids=[rule.__name__ for rule, *_ in VIOLATIONS])
def test_a_planted_violation_is_found(tmp_path: Path, rule: Rule, tree: Tree, start: str) -> None:
    found = rule(plant(tmp_path, tree))
    assert any(line.startswith(start) for line in found), found


@pytest.mark.parametrize(("rule", "tree"), NEAR_MISSES, ids=[rule.__name__ for rule, _ in NEAR_MISSES])
def test_a_near_miss_is_not_found(tmp_path: Path, rule: Rule, tree: Tree) -> None:
    assert rule(plant(tmp_path, tree)) == []


def test_every_rule_has_a_planted_violation_and_a_near_miss() -> None:
    assert {rule for rule, _, _ in VIOLATIONS} == {rule for rule, _ in NEAR_MISSES} == set(RULES)


def test_every_exception_is_needed() -> None:
    unused = "\n".join(unused_names(ROOT, allowed={}))
    assert [name for name in LIBRARY if f"uses `{name}`;" not in unused] == []
    circles = "\n".join(import_circles(ROOT, allowed={}))
    assert [arrow for arrow in CIRCLES if " -> ".join(arrow) not in circles] == []


def test_the_whole_package_is_read() -> None:
    house = read_house(ROOT)
    assert len(house) > 100
    assert house["disttrain.engine.engine"].public.keys() >= {"Engine"}
