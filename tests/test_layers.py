"""The package has eight floors, and imports go downwards only (docs/architecture.md)."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "disttrain"

# From the ground up. A room imports from floors below its own and from itself, never from a room beside it.
FLOORS = [
    ["version", "errors", "process"],
    ["decay", "devices", "environment", "files", "host_memory", "mistakes", "pod", "seeding"],
    ["config", "backend", "data", "precision", "parallel", "launching"],
    ["engine", "checkpoint"],
    ["handlers", "evidence"],
    ["run"],
    ["commands"],
    ["launch", "__main__"],
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

ALLOWED = {
    "torch.distributed": {"backend", "parallel", "checkpoint", "launching"},
    "torch_xla": {"backend/xla_spmd.py", "backend/xla.py", "precision/xla.py", "parallel"},
    "signal": {
        "handlers/preemption.py",  # the signal handlers of a rank
        "data/fetching.py",  # a worker ignores what is meant for its rank
        "launching/end_with_launcher.py",  # asks the kernel for SIGKILL when the launcher dies
        "launching/recovering_agent.py",  # the launcher's own signals, and the names of those that ended a rank
        "launching/killed_ranks.py",  # the name of the signal that ended a rank
        "launching/torchrun.py",  # the launcher's own signals, in a process that is no rank
        "commands/scenarios.py",  # sends SIGKILL
        "commands/verification.py",  # knows a death by its SIGKILL
    },
}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) for every import in a file, also inside functions, but not for types alone."""
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
    advice = []
    for path in sorted(package.rglob("*.py")):
        room, name = room_of(path, package), str(path.relative_to(package))
        if room == "__init__":
            continue
        if room not in FLOOR:
            advice.append(f"{name}: it is on no floor; add it to FLOORS")
            continue
        for line, module in imports(path):
            parts = module.split(".")
            if parts[0] == "disttrain" and len(parts) > 1:
                other = parts[1]
                if other == room:
                    continue
                if FLOOR.get(other, 99) >= FLOOR[room]:
                    advice.append(f"{name}:{line}: imports {module}")
            for outside, rooms in ALLOWED.items():
                if (module + ".").startswith(outside + ".") and not {room, name} & rooms:
                    advice.append(f"{name}:{line}: imports {outside}, which only {sorted(rooms)} may import")
    return advice


def test_imports_go_downwards() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("name", "line", "expected"),
    [
        ("errors.py", "from disttrain.engine import Engine", "errors.py:1: imports disttrain.engine.Engine"),
        ("data/sampler.py", "import disttrain.run.train", "data/sampler.py:1: imports disttrain.run.train"),
        ("config/load.py", "import disttrain.backend", "config/load.py:1: imports disttrain.backend"),
        ("backend/base.py", "from disttrain.data import SlotLoader", "backend/base.py:1: imports disttrain.data"),
        ("engine/engine.py", "import torch.distributed as dist", "engine/engine.py:1: imports torch.distributed"),
        ("run/train.py", "from disttrain import commands", "run/train.py:1: imports disttrain.commands"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, name: str, line: str, expected: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "disttrain", ignore=shutil.ignore_patterns("__pycache__"))
    planted = tmp_path / "disttrain" / name
    planted.write_text(line + "\n" + planted.read_text())
    assert any(violation.startswith(expected) for violation in violations(tmp_path / "disttrain"))


def test_the_package_has_8_floors() -> None:
    assert len(FLOORS) == 8


def test_environment_variables_are_read_in_few_files() -> None:
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
    }
    of_launchers = {f"launching/{name}.py" for name in ("torchrun", "pet_variables", "recovery_variables")}
    assert readers == {"environment.py", "pod.py", "process.py", *of_launchers}
