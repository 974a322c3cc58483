"""The settings without which a program gives other bits on the same device, and messages for refused operations.

*Contract*: the run calls these functions before it builds the model and before an accelerator starts. They change
settings of the whole process for good; no import and no `connect()` does. docs/guarantees.md gives the reason for each
setting, and its limits.

*Errors*: ConfigError for an operation without a deterministic kernel, and for a CUBLAS_WORKSPACE_CONFIG under which
cuBLAS is not deterministic.

*Source*: the notes "Reproducibility" of torch and "Results reproducibility" of cuBLAS.
"""

import os
import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.utils.deterministic

from disttrain.environment import pjrt_device, set_default
from disttrain.errors import ConfigError
from disttrain.process import kernel_variables

CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""The values for which cuBLAS documents reproducible bits; the first costs 24 MiB a device and is faster."""

_REFUSED = re.compile(r"(\w+) does not have a deterministic implementation, but you set")
_NOT_THE_USERS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))


def make_deterministic(cpu_threads: int = 1, *, strict: bool = True) -> None:
    """Choose deterministic kernels, and `cpu_threads` threads inside an operation on the CPU, for this process.

    CPU kernels divide their work by the number of threads, so the number changes results and is part of the run. An
    operation without a deterministic kernel raises RuntimeError when it is called. With `strict=False` it warns and
    gives other bits each time. So do the backwards of flash and memory-efficient attention on CUDA then, which torch
    makes deterministic in strict mode only. Call this before anything runs on an accelerator.

    *Errors*: ConfigError if the user has set CUBLAS_WORKSPACE_CONFIG to another value than `CUBLAS_WORKSPACES` (not
    with `strict=False`); ValueError for `cpu_threads` below 1.

    *Cost*: none on the CPU. On CUDA deterministic kernels are slower; how much depends on the model.
    """
    set_cpu_threads(cpu_threads)
    workspace = set_default("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    if strict and workspace not in CUBLAS_WORKSPACES:
        raise ConfigError(
            f"expected CUBLAS_WORKSPACE_CONFIG to be {' or '.join(CUBLAS_WORKSPACES)}, got {workspace!r}, under which "
            "cuBLAS may give other bits each time; unset it, or set one of those"
        )
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    # This debugging aid would write every new buffer. It is a property of the module, which torch's stubs lack.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False  # else cuDNN takes the kernel that is fastest in a trial
    torch.backends.cudnn.deterministic = True  # some operations, such as the CTC loss, read this flag only
    let_torchscript_compile_once()


def let_torchscript_compile_once() -> None:
    """Let TorchScript compile a function at its first call, and not anew after a few calls.

    The two programs round differently, and how often a rank has called a function depends on the number of ranks.
    """
    for switch in ("_jit_set_profiling_executor", "_jit_set_profiling_mode"):
        getattr(torch._C, switch, lambda on: None)(False)


def set_cpu_threads(num_threads: int) -> None:
    """Let an operation on the CPU use `num_threads` threads."""
    if num_threads < 1:
        raise ValueError(f"expected cpu_threads to be at least 1, got {num_threads}")
    torch.set_num_threads(num_threads)


def kernels_of(device: torch.device) -> str:
    """Return torch's version and the kind of processor, which choose the kernels and so decide a run's bits.

    The kind of a CPU is the instruction set that torch uses; MKL and oneDNN mostly choose the same one. Variables that
    make a library choose others are named too.
    """
    if device.type == "cpu":
        kind = torch.backends.cpu.get_cpu_capability()
    elif device.type == "xla":  # torch has no device module for XLA
        kind = pjrt_device() or "of its own choice"
    else:
        kind = getattr(torch.get_device_module(device), "get_device_name", str)(device)
    return ", ".join([f"torch {torch.__version__} on {device.type} {kind}", *kernel_variables()])


@contextmanager
def refused_operations_named() -> Iterator[None]:
    """Turn the error of an operation that strict mode refuses into a ConfigError for a person."""
    try:
        yield
    except Exception as error:
        # The texts are compared, not the types: the error of a loader's worker arrives quoted in another error.
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
        "deterministic kernel here; use another operation, or deterministic=false, which only warns and gives up the "
        "promise of the same bits"
    )


def set_tf32(enabled: bool) -> None:
    """Let CUDA compute float32 matrix products and convolutions in TF32 (10 bits of mantissa), or forbid it.

    This is a setting of the whole process. It starts no device, and changes nothing on other devices than CUDA. It uses
    `allow_tf32`, because from torch 2.9 to 2.13 this older name also sets the newer `fp32_precision`. After the newer
    name alone, code that reads the older one (torch.compile does) gets an error.

    *Source*: torch's note "CUDA semantics", "TensorFloat-32".
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TF32", category=UserWarning)  # it recommends the newer names
        torch.backends.cuda.matmul.allow_tf32 = enabled
        torch.backends.cudnn.allow_tf32 = enabled
