"""WHERE a run happens: ranks, devices, and the collectives by which ranks agree.

`connect()` returns the `Backend` of this process; `base.py` says what it promises. Whoever needs a rank or a
collective is given one. Environment variables are read here and nowhere else.
"""

from disttrain.backend.base import Backend, Op, Place
from disttrain.backend.connect import NAMES, connect
from disttrain.backend.determinism import kernels_of, make_deterministic, refused_operations_named, set_cpu_threads
from disttrain.backend.tf32 import set_tf32

__all__ = [
    "NAMES",
    "Backend",
    "Op",
    "Place",
    "connect",
    "kernels_of",
    "make_deterministic",
    "refused_operations_named",
    "set_cpu_threads",
    "set_tf32",
]
