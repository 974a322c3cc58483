"""The house has five floors and imports go downwards only (docs/architecture.md)."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "disttrain"

# From the ground up. A room imports from floors below its own and from itself; the rooms of the first and
# the top floor stand in one row each, and there a file may use those named before it.
FLOORS = [
    ["version", "errors", "seeding", "config", "run_directory"],
    ["backend", "data", "precision", "parallel"],
    ["engine", "checkpoint"],
    ["handlers", "observe"],
    [
        "run",
        "assemble",
        "kept",
        "resume",
        "saving",
        "rollback",
        "recipe",
        "summary",
        "ranks",
        "launch",
        "scenarios",
        "verify",
        "checkpoint_command",
        "cli",
    ],
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
ROWS = {0, 4}  # floors on which a room may use the ones named before it

ALLOWED = {
    "torch.distributed": {"backend", "parallel", "checkpoint"},
    "torch_xla": {"backend/spmd.py", "backend/xla.py", "precision/xla.py", "parallel"},
    "signal": {
        "handlers/preemption.py",
        "data/fetching.py",
        "backend/parent.py",
        "backend/torchrun.py",
        "scenarios.py",
        "verify.py",
    },  # the others install no handler in a rank
}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) of every import in a file, inside functions too, but not for types alone."""
    tree = ast.parse(path.read_text())
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def room_of(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def violations(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        room, name = room_of(path, package), str(path.relative_to(package))
        if room in ("__init__", "__main__"):
            continue
        if room not in FLOOR:
            found.append(f"{name}: no floor is named for it")
            continue
        for line, module in imports(path):
            parts = module.split(".")
            if parts[0] == "disttrain" and len(parts) > 1:
                other = parts[1]
                if other == room:
                    continue
                above = FLOOR.get(other, 99) > FLOOR[room]
                beside = FLOOR.get(other) == FLOOR[room]
                row = FLOORS[FLOOR[room]]
                earlier = beside and FLOOR[room] in ROWS and row.index(other) < row.index(room)
                if above or (beside and not earlier):
                    found.append(f"{name}:{line}: imports {module}")
            for outside, rooms in ALLOWED.items():
                if (module + ".").startswith(outside + ".") and not {room, name} & rooms:
                    found.append(f"{name}:{line}: imports {outside}, which only {sorted(rooms)} may")
    return found


def test_imports_go_downwards() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("name", "line", "told"),
    [
        ("errors.py", "from disttrain.engine import Engine", "errors.py:1: imports disttrain.engine.Engine"),
        ("data/sampler.py", "import disttrain.recipe", "data/sampler.py:1: imports disttrain.recipe"),
        ("backend/base.py", "from disttrain.data import SlotLoader", "backend/base.py:1: imports disttrain.data"),
        ("engine/engine.py", "import torch.distributed as dist", "engine/engine.py:1: imports torch.distributed"),
        ("recipe.py", "from disttrain import launch", "recipe.py:1: imports disttrain.launch"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, name: str, line: str, told: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "disttrain", ignore=shutil.ignore_patterns("__pycache__"))
    planted = tmp_path / "disttrain" / name
    planted.write_text(line + "\n" + planted.read_text())
    assert any(found.startswith(told) for found in violations(tmp_path / "disttrain"))


def test_environment_variables_are_read_in_the_backend_alone() -> None:
    readers = {
        room_of(path, PACKAGE)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
    }
    assert readers <= {"backend"}
