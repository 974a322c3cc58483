"""Lives of scripts: processes forked from one that has imported torch, killed at a step or in the middle of a save.

    lives = Lives(environment)
    codes = lives("loop.py", folder, ranks=3, kill=("step", 17))      # the exit codes by rank, -9 for a killed rank
    codes = lives.launch(["cfg.py", "seed=5"], folder, ...)           # python -m disttrain.launch cfg.py seed=5

Importing torch takes seconds, and a run that is killed and resumed several times has many lives. Each life is still a
process of its own. It gets its rank from the variables that torchrun sets, it dies by SIGKILL, and nothing of it stays
in memory. If one rank fails, the others are killed; those of a launch get SIGTERM first, as from torchrun. `ranks=0`
starts one process without the variables of a rank.
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
    """The process that forks; it ends with `close`, or with this process."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(
        self, script: str, folder: Path, *, ranks: int = 0, kill: tuple[str, int] | None = None, victim: int = 0
    ) -> list[int]:
        """Run `script` in `folder`; `kill` rank `victim` at its n-th "step" of the optimizer or its n-th "fsync".

        The output goes to `out.txt` in that folder.
        """
        out = str(folder / "out.txt")
        job = {"script": script, "kill": kill, "victim": victim, "out": out, "err": out, "limit_s": None}
        return self._ask({**job, "environment": None, "folder": str(folder), "ranks": ranks})

    def launch(
        self, words: Sequence[str], folder: Path, outputs: Path, environment: dict[str, str], ranks: int, limit_s: float
    ) -> list[int]:
        """Run `disttrain.launch` with these words; its output goes to `out` and `err` in the folder `outputs`.

        If the ranks have not ended within `limit_s`, they are killed, and this raises TimeoutError.
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
    import sklearn.datasets  # noqa: F401 - the scripts import it; here it is imported once for all of them
    import torch._dynamo  # noqa: F401 - takes two seconds, in each process unless it is imported here

    import disttrain
    import disttrain.commands.launch

    for name in disttrain.__all__:
        getattr(disttrain, name)
    gc.freeze()  # otherwise the first collection of each child would copy all objects
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
    """Return the exit codes by rank; None if the ranks have not ended within `limit_s`.

    The first failure ends the other ranks by SIGKILL; `gently`, by SIGTERM, and by SIGKILL after 30 s.
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
        file = open(name, "r" if descriptor == 0 else "a")  # noqa: SIM115 - open until the process ends
        os.dup2(file.fileno(), descriptor)
    if job["kill"] is not None and rank == job["victim"]:
        arm(*job["kill"])
    code = 1
    try:
        if "words" in job:
            from disttrain.commands import launch

            sys.argv = [str(launch.__file__), *job["words"]]
            code = launch.main()
        else:
            sys.path.insert(0, job["folder"])  # as Python does for a script, which may import a file beside it
            runpy.run_path(job["script"], run_name="__main__")
            code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except Exception:
        traceback.print_exc()
    # The end of an interpreter, without freeing all imported objects one by one, which takes long.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def arm(event: str, count: int) -> None:
    """Make this process kill itself by SIGKILL at its `count`-th step or fsync."""
    so_far = 0

    def count_one(*_: Any) -> None:
        nonlocal so_far
        so_far += 1
        if so_far == count:
            os.kill(os.getpid(), signal.SIGKILL)

    if event == "step":
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(count_one)
    else:
        fsync = os.fsync
        os.fsync = lambda descriptor: (count_one(), fsync(descriptor))[1]


if __name__ == "__main__":
    serve()
