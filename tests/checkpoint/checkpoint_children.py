"""Child processes for tests: forked, so that each costs milliseconds and not an import of torch."""

import os
import traceback
from collections.abc import Callable

import torch


def fork(body: Callable[[], None]) -> int:
    """Run `body` in a child; it exits 0, or 1 after printing what was raised. Return its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # the parent's threads are not in the child, which would wait for them
        body()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Wait for a child; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
