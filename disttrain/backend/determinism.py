"""Settings without which the same program gives other bits on the same device.

*Contract*: called by the recipe before the model is built and before an accelerator starts; no effect of an import
nor of `connect()`. It changes settings of the whole process and leaves them so.

*Source*: the notes "Reproducibility" of torch and "Results reproducibility" of cuBLAS.
"""

import torch
import torch.utils.deterministic

from disttrain.backend.environment import set_default


def make_deterministic(cpu_threads: int = 1) -> None:
    """Choose deterministic kernels, and `cpu_threads` threads inside an operation on the CPU.

    CPU kernels cut their work by the number of threads, so it changes results and is part of the run. An operation
    that has no deterministic kernel warns when it is used. A CUBLAS_WORKSPACE_CONFIG of the user's is kept.
    """
    set_cpu_threads(cpu_threads)
    set_default("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that costs a write of every new buffer; a property of the module, which no stub knows.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def set_cpu_threads(num_threads: int) -> None:
    """Let an operation on the CPU use `num_threads` threads."""
    if num_threads < 1:
        raise ValueError(f"expected cpu_threads to be at least 1, got {num_threads}")
    torch.set_num_threads(num_threads)
