"""Lives of scripts: processes forked off one that has imported torch, killed at a step or in the middle of a save.

    lives = Lives()
    codes = lives("loop.py", folder, ranks=3, kill=("step", 17))      # the exit codes by rank, -9 where it was killed

Importing torch costs seconds, and a run that is killed and resumed several times has many lives. Each is a process of
its own all the same: it is told its rank as torchrun would tell it, dies by SIGKILL, and takes nothing along. When one
rank ends badly the others are killed, as torchrun does it. `ranks=0` is `python loop.py`.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn


class Lives:
    """The process that forks; it ends with `close`, or with this one."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(
        self, script: str, folder: Path, *, ranks: int = 0, kill: tuple[str, int] | None = None, victim: int = 0
    ) -> list[int]:
        """Run `script` in `folder`; `kill`: at the n-th "step" of the optimizer, or the n-th "fsync", of rank `victim`.

        What it prints goes to `out.txt` in that folder.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        job = {"script": script, "folder": str(folder), "ranks": ranks, "kill": kill, "victim": victim}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        self._server.communicate()


def serve() -> None:
    import sklearn.datasets  # noqa: F401 - what the scripts import, once for all of them
    import torch._dynamo  # noqa: F401 - two seconds, which the first optimizer of a process pays else

    import disttrain

    for name in disttrain.__all__:
        getattr(disttrain, name)
    gc.freeze()  # else the first collection of each child would copy all of it
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks: dict[int, int] = {}
        for rank in range(max(1, job["ranks"])):
            pid = os.fork()
            if pid == 0:
                live(job, rank, port)
            ranks[pid] = rank
        print(json.dumps(wait_for(ranks)), flush=True)


def wait_for(ranks: dict[int, int]) -> list[int]:
    """Return the exit codes by rank; the first bad one ends the others."""
    codes: dict[int, int] = {}
    while len(codes) < len(ranks):
        pid, status = os.wait()
        codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
        if codes[ranks[pid]]:
            for other, rank in ranks.items():
                if rank not in codes:
                    os.kill(other, signal.SIGKILL)
    return [codes[rank] for rank in sorted(codes)]


def live(job: dict[str, Any], rank: int, port: int) -> NoReturn:
    os.chdir(job["folder"])
    if job["ranks"]:
        size = str(job["ranks"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    out = open("out.txt", "a")  # noqa: SIM115 - it is the process's output until its end
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    if job["kill"] is not None and rank == job["victim"]:
        arm(*job["kill"])
    code = 1
    try:
        runpy.run_path(job["script"], run_name="__main__")
        code = 0
    except Exception:
        traceback.print_exc()
    # What an interpreter does at its end, without freeing all that was imported, one object at a time.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def arm(what: str, count: int) -> None:
    """Let this process die by SIGKILL at its `count`-th step or fsync."""
    seen = 0

    def passed(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    if what == "step":
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(passed)
    else:
        fsync = os.fsync
        os.fsync = lambda descriptor: (passed(), fsync(descriptor))[1]


if __name__ == "__main__":
    serve()
