"""A rank ends with the launcher that started it.

A killed torchrun leaves its ranks behind: they go on training, hold the run directory, and meet the ranks that a
new launch starts. The kernel is asked to end them with their parent (Linux; elsewhere they run to their end).

*Source*: prctl(2), PR_SET_PDEATHSIG.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

from disttrain.backend.environment import read_launch
from disttrain.errors import BackendError

PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Ask the kernel to kill this process when its torchrun dies; BackendError where that has died already."""
    launch = read_launch()
    if launch is None or launch.launcher != "torchrun" or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # In a container torchrun may itself be process 1; a rank that was left to another process 1 has lost it.
    above = Path("/proc/1/cmdline").read_bytes() if os.getppid() == 1 else b"torch"
    if not any(launcher in above for launcher in (b"torch", b"disttrain")):
        raise BackendError("the launcher of this rank has died; start the run again")
