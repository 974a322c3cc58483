"""Child processes for tests; they are forked, so each costs milliseconds instead of an import of torch."""

import os
import traceback
from collections.abc import Callable

import torch


def fork(body: Callable[[], None]) -> int:
    """Run `body` in a child and return its process id; the child exits with 1 after an exception, which it prints."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # the child has none of the parent's threads and would wait for them
        body()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Wait for a child; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
