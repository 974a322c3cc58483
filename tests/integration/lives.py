"""Lives of scripts: processes forked off one that has imported torch, killed at a step or in the middle of a save.

    lives = Lives()
    codes = lives("loop.py", folder, ranks=3, kill=("step", 17))      # the exit codes by rank, -9 where it was killed
    codes = lives.launch(["cfg.py", "seed=5"], folder, ranks=2)       # python -m disttrain.launch cfg.py seed=5

Importing torch costs seconds, and a run that is killed and resumed several times has many lives. Each is a process of
its own all the same: it is told its rank as torchrun would tell it, dies by SIGKILL, and takes nothing along. When one
rank ends badly the others are killed; those of a launch by SIGTERM first, as torchrun does it. `ranks=0` starts one
process that is told no rank.
"""

import atexit
import gc
import json
import math
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
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
        out = str(folder / "out.txt")
        job = {"script": script, "kill": kill, "victim": victim, "out": out, "err": out, "limit_s": None}
        return self._ask({**job, "environment": None, "folder": str(folder), "ranks": ranks})

    def launch(
        self, words: Sequence[str], folder: Path, outputs: Path, environment: dict[str, str], ranks: int, limit_s: float
    ) -> list[int]:
        """Run `disttrain.launch` with these words; what it prints goes to `out` and `err` in the folder `outputs`.

        Ranks that have not ended within `limit_s` are killed; then this raises TimeoutError.
        """
        job = {"words": words, "out": str(outputs / "out"), "err": str(outputs / "err"), "limit_s": limit_s}
        return self._ask({**job, "environment": environment, "kill": None, "folder": str(folder), "ranks": ranks})

    def _ask(self, job: dict[str, Any]) -> list[int]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        codes = json.loads(self._server.stdout.readline())
        if codes is None:
            raise TimeoutError(f"the launch did not end within {job['limit_s']} s")
        return codes

    def close(self) -> None:
        self._server.communicate()


def serve() -> None:
    import sklearn.datasets  # noqa: F401 - what the scripts import, once for all of them
    import torch._dynamo  # noqa: F401 - two seconds, which the first optimizer of a process pays else

    import disttrain
    import disttrain.launch

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
        print(json.dumps(wait_for(ranks, gently="words" in job, limit_s=job["limit_s"])), flush=True)


def wait_for(ranks: dict[int, int], *, gently: bool, limit_s: float | None) -> list[int] | None:
    """Return the exit codes by rank; the first bad one ends the others, `gently` by SIGTERM and 30 s later.

    None where `limit_s` was over before.
    """
    late = False
    codes: dict[int, int] = {}

    def end(number: signal.Signals) -> None:
        for other, rank in ranks.items():
            if rank not in codes:
                os.kill(other, number)

    kill_at = None if limit_s is None else time.monotonic() + limit_s
    while len(codes) < len(ranks):
        pid, status = os.waitpid(-1, 0 if kill_at is None else os.WNOHANG)
        if pid:
            first = not any(codes.values())
            codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
            if codes[ranks[pid]] and first:
                end(signal.SIGTERM if gently else signal.SIGKILL)
                kill_at = min(kill_at or math.inf, time.monotonic() + 30) if gently else None
        elif kill_at is not None and time.monotonic() > kill_at:
            end(signal.SIGKILL)
            late, kill_at = not any(codes.values()), None
        else:
            time.sleep(0.01)
    return None if late else [codes[rank] for rank in sorted(codes)]


def live(job: dict[str, Any], rank: int, port: int) -> NoReturn:
    os.setsid()
    os.chdir(job["folder"])
    if job["environment"] is not None:
        os.environ.clear()
        os.environ.update(job["environment"])
    if job["ranks"]:
        size = str(job["ranks"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for descriptor, name in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        file = open(name, "r" if descriptor == 0 else "a")  # noqa: SIM115 - the process's own until its end
        os.dup2(file.fileno(), descriptor)
    if job["kill"] is not None and rank == job["victim"]:
        arm(*job["kill"])
    code = 1
    try:
        if "words" in job:
            from disttrain import launch

            sys.argv = [str(launch.__file__), *job["words"]]
            code = launch.main()
        else:
            runpy.run_path(job["script"], run_name="__main__")
            code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except Exception:
        traceback.print_exc()
    # What an interpreter does at its end, without freeing all that was imported, one object at a time.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
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
