"""Importing disttrain is cheap and has no effect."""

import json
import subprocess
import sys

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
import disttrain.launch, disttrain.cli  # rich, which these load, draws from python's generator as it is imported
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
    seen = json.loads(done.stdout)
    assert seen == {"changed": False, "drawn": False, "group": False, "cuda": False, "optional": []}


def test_import_loads_nothing_heavy_beyond_torch() -> None:
    # What a cheap import means, without a clock: none of the slow packages is loaded before it is used.
    code = (
        "import sys, torch; b = {*sys.modules}; import disttrain; print(*{m.split('.')[0] for m in {*sys.modules} - b})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"disttrain"}


def test_public_names_are_few_and_real() -> None:
    assert len(disttrain.__all__) <= 40
    for name in disttrain.__all__:
        assert getattr(disttrain, name) is not None
    assert set(disttrain.__all__) <= set(dir(disttrain))
