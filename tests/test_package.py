"""Importing disttrain is cheap and has no effect, and its lists of public names agree."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import disttrain

PROBE = """
import json, random, sys, threading
import numpy, torch

def effects():
    deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.initial_seed(), torch.get_num_threads(), threading.active_count(), deterministic

before, drawn = effects(), random.getstate()
import disttrain
for name in disttrain.__all__:
    getattr(disttrain, name)
drawn = drawn != random.getstate()
# These modules import rich, and that draws from Python's generator.
import disttrain.commands.launch, disttrain.commands.main, disttrain.launch
print(json.dumps({
    "changed": before != effects(),
    "drawn": drawn,
    "group": torch.distributed.is_initialized(),
    "cuda": torch.cuda.is_initialized(),
    "optional": sorted({"apex", "torch_xla", "tensorboard", "sklearn"} & set(sys.modules)),
}))
"""


def test_importing_everything_has_no_effect() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    effects = json.loads(done.stdout)
    assert effects == {"changed": False, "drawn": False, "group": False, "cuda": False, "optional": []}


def test_import_loads_nothing_heavy_beyond_torch() -> None:
    # Without a timed test: no slow package is loaded before its first use.
    code = (
        "import sys, torch; b = {*sys.modules}; import disttrain; print(*{m.split('.')[0] for m in {*sys.modules} - b})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"disttrain"}


def test_the_public_names_are_few_and_exist() -> None:
    assert len(disttrain.__all__) <= 40
    for name in disttrain.__all__:
        assert getattr(disttrain, name) is not None
    assert disttrain.__all__ == dir(disttrain)
    with pytest.raises(AttributeError, match="module 'disttrain' has no attribute 'Motor'"):
        _ = disttrain.Motor


def test_type_checkers_see_the_same_names_from_the_same_rooms() -> None:
    tree = ast.parse(Path(disttrain.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    rooms: dict[str, list[str]] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name  # the form by which a type checker exports a name
            rooms.setdefault(str(node.module).removeprefix("disttrain."), []).append(alias.name)
    assert rooms == disttrain._ROOMS
