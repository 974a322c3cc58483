"""Settings without which the same program gives other bits on the same device, and what is said of what they refuse.

*Contract*: called by the recipe before the model is built and before an accelerator starts; no effect of an import
nor of `connect()`. It changes settings of the whole process and leaves them so. What each is for, and what it does
not reach: docs/guarantees.md.

*Errors*: ConfigError for an operation without a deterministic kernel, and for a CUBLAS_WORKSPACE_CONFIG under which
cuBLAS is not deterministic.

*Source*: the notes "Reproducibility" of torch and "Results reproducibility" of cuBLAS.
"""

import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.utils.deterministic

from disttrain.backend.environment import pjrt_device, set_default
from disttrain.errors import ConfigError

CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""The values for which cuBLAS documents the same bits each time; the first costs 24 MiB a device and is faster."""

_REFUSED = re.compile(r"(\w+) does not have a deterministic implementation, but you set")
_NOT_THE_USERS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))


def make_deterministic(cpu_threads: int = 1, *, strict: bool = True) -> None:
    """Choose deterministic kernels, and `cpu_threads` threads inside an operation on the CPU, for this process.

    CPU kernels cut their work by the number of threads, so it changes results and is part of the run. An operation
    that has no deterministic kernel raises RuntimeError where it is used; `strict=False`: it warns, and goes on with
    other bits each time, and so do the backwards of flash and memory-efficient attention on CUDA, which torch makes
    deterministic in strict mode alone. Call it before anything runs on an accelerator.

    *Errors*: ConfigError for another CUBLAS_WORKSPACE_CONFIG than those two where the user has set one (not where
    `strict=False`), ValueError for `cpu_threads` below 1.
    *Cost*: none on the CPU. On CUDA deterministic kernels are slower, by how much depends on the model.
    """
    set_cpu_threads(cpu_threads)
    workspace = set_default("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    if strict and workspace not in CUBLAS_WORKSPACES:
        raise ConfigError(
            f"expected CUBLAS_WORKSPACE_CONFIG to be {' or '.join(CUBLAS_WORKSPACES)}, got {workspace!r}, under which "
            "cuBLAS may give other bits each time; unset it, or set one of those"
        )
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    # A debugging aid that costs a write of every new buffer; a property of the module, which no stub knows.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False  # else the kernel is the one that was fastest today
    torch.backends.cudnn.deterministic = True  # what looks at this flag alone, such as CTC's loss


def set_cpu_threads(num_threads: int) -> None:
    """Let an operation on the CPU use `num_threads` threads."""
    if num_threads < 1:
        raise ValueError(f"expected cpu_threads to be at least 1, got {num_threads}")
    torch.set_num_threads(num_threads)


def kernels_of(device: torch.device) -> str:
    """Return what chooses the kernels, and so decides a run's bits: torch's version and the kind of processor.

    Of a CPU that is the instruction set which torch uses; MKL and oneDNN choose by themselves, mostly alike.
    """
    if device.type == "cpu":
        kind = torch.backends.cpu.get_cpu_capability()
    elif device.type == "xla":  # torch has no module for it
        kind = pjrt_device() or "of its own choice"
    else:
        kind = getattr(torch.get_device_module(device), "get_device_name", str)(device)
    return f"torch {torch.__version__} on {device.type} {kind}"


@contextmanager
def refused_operations_named() -> Iterator[None]:
    """Turn the error of an operation that strict mode refuses into one message for a person: a ConfigError."""
    try:
        yield
    except Exception as error:
        # By their texts: what a loader's worker raised comes as another error, which quotes it.
        refused = [cause for cause in _causes(error) if _REFUSED.search(str(cause))]
        if not refused:
            raise
        raise ConfigError(_refusal(refused[-1])) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _refusal(error: BaseException) -> str:
    operation = " ".join(_REFUSED.findall(str(error)))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THE_USERS)]
    called = f" (called in {frames[-1].name}, {frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return (
        f"expected operations that give the same bits each time, got {operation}{called}, for which torch has no "
        "deterministic kernel here; use another operation, or deterministic=false, which goes on with a warning and "
        "gives up the promise of the same bits"
    )
