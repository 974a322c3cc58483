"""Gives every process of a run the same hash seed, and one thread to each numeric library beside torch.

A process gets both from its environment, and both change bits: the order of a set of texts depends on the hash seed,
and the sums of a BLAS on its number of threads. torchrun, Slurm, a shell and the machine each set others. So the
programs of this package set them themselves, whatever was set. torch's threads are the config's `cpu_threads`.

*Contract*: a library reads its variable when it is imported, and Python its hash seed when it starts. So
`begin_process` is called by a program before it imports anything heavy, and this file imports nothing. The processes
that are started from here (ranks, workers, however they are started) inherit the variables.

*Cost*: one more start of the interpreter, 20 ms, before torch is imported.
"""

import os
import sys
import threading
from collections.abc import Mapping

SETTINGS: Mapping[str, str] = {
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",  # scikit-learn, Arrow; torch's own number is set later, by `cpu_threads`
    "OMP_DYNAMIC": "FALSE",  # else OpenMP takes fewer threads than asked for when the machine is busy
    "OPENBLAS_NUM_THREADS": "1",  # numpy and scipy
    "GOTO_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",  # numpy on macOS
    "NUMEXPR_NUM_THREADS": "1",  # pandas
    "NUMBA_NUM_THREADS": "1",
    "TBB_NUM_THREADS": "1",
    "POLARS_MAX_THREADS": "1",
}
"""The variables of every process of a run. What needs more threads asks for them in the cfg.py, by its own function."""

CONFLICTING = ("OMP_THREAD_LIMIT", "MKL_DOMAIN_NUM_THREADS")
"""Variables that would overrule these settings, or torch's number of threads; they are removed."""

CHOOSING_KERNELS = (
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    *("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES"),
    *("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
)
"""Variables by which a user chooses kernels that give other bits; they are left as they are, and recorded."""

_BEGUN = "DISTTRAIN_BEGUN_AGAIN"
"""Holds the id of a process that has begun again, so that none does so twice."""

_threads_at_import = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS")


def set_process_variables() -> None:
    """Set the variables, for the processes that this one starts and for libraries that it has not imported yet."""
    os.environ.update(SETTINGS)
    for name in CONFLICTING:
        os.environ.pop(name, None)


def begin_process() -> None:
    """Set the variables; where that is too late for this process, run its program again from its start.

    The program keeps its process id, its arguments and its open streams. It is not run again from a notebook or another
    program that has called this one, nor a second time.
    """
    too_late = sys.flags.hash_randomization or ("numpy" in sys.modules and _threads_at_import != "1")
    set_process_variables()
    has_begun_again = os.environ.pop(_BEGUN, None) == str(os.getpid())
    if not too_late or has_begun_again or not _is_own_program():
        return
    os.environ[_BEGUN] = str(os.getpid())
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_own_program() -> bool:
    """Return whether this process was started to run a command of this package, and has done nothing else yet."""
    is_named = any(os.path.basename(word) in ("disttrain", "disttrain.launch") for word in sys.orig_argv[1:])
    return is_named and bool(sys.executable) and "torch" not in sys.modules and threading.active_count() == 1


def differences_of_process() -> list[str]:
    """Name the settings of this process that others of its run need not have, because no program of ours began it."""
    found = []
    if sys.flags.hash_randomization:
        found.append("texts have hashes of its own (PYTHONHASHSEED is not 0), so sets have an order of its own")
    if _threads_at_import != "1":
        found.append("numpy has as many threads as this machine or its user chose (OMP_NUM_THREADS was not 1)")
    return found


def kernel_variables() -> list[str]:
    """Return the variables that choose kernels and are set, each as NAME=VALUE."""
    return [f"{name}={os.environ[name]}" for name in CHOOSING_KERNELS if os.environ.get(name)]
