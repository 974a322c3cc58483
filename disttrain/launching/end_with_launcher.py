"""Ends a rank with the torchrun that started it.

A killed torchrun leaves its ranks behind: they continue to train, hold the run directory, and meet the ranks that a new
launch starts. So each rank asks the kernel to kill it with its parent. This works on Linux; elsewhere such ranks run to
their end.

*Source*: prctl(2), PR_SET_PDEATHSIG.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

from disttrain.environment import read_launch
from disttrain.errors import BackendError

_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Ask the kernel to kill this process when its torchrun dies; BackendError if torchrun has died already."""
    launch = read_launch()
    if launch is None or launch.launcher != "torchrun" or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # In a container torchrun may itself be process 1. A rank whose parent is another process 1 has lost its torchrun.
    parent_command = Path("/proc/1/cmdline").read_bytes() if os.getppid() == 1 else b"torch"
    if not any(launcher in parent_command for launcher in (b"torch", b"disttrain")):
        raise BackendError("expected this rank's torchrun to run, got one that has died; start the run again")
