"""WHERE a run happens: ranks, devices, and the collectives by which ranks agree.

`connect()` returns the `Backend` of this process; `base.py` says what it promises. Whoever needs a rank or a
collective is given one. Environment variables are read here and nowhere else.
"""

from disttrain.backend.base import Backend, Op, Place
from disttrain.backend.connect import NAMES, connect
from disttrain.backend.determinism import make_deterministic, refused_operations_named, set_cpu_threads

__all__ = [
    "NAMES",
    "Backend",
    "Op",
    "Place",
    "connect",
    "make_deterministic",
    "refused_operations_named",
    "set_cpu_threads",
]
