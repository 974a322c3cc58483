"""torchrun in this process, with what experience says that its ranks need, and the exit code of a run.

*Contract*: `run_torchrun` starts ranks, watches them, starts them again when one dies, and returns the exit code that
the run's ranks ended with; torchrun itself returns 1 for whatever is not 0. A rank says its code with `leave`, which
also lets torchrun take it for well done where to start again would change nothing: after a signal, after a mistake.

*How*: what torchrun writes about a rank that failed is left out, for that rank has said why; a rank that was killed
could not, so that is said in one line. Ranks are not started as new interpreters, each of which imports torch and what
an optimizer and DDP import of it at their first use (4 s of a core): they are forked off one process per host that has
imported it and has run nothing. That server ends with this process, and its ranks with the server.

*Source*: torch.distributed.run and torch.distributed.elastic; `multiprocessing`, "forkserver"; prctl(2).
"""

import importlib
import logging
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import torch

from disttrain.backend import environment
from disttrain.backend.local import as_if_started_by_hand
from disttrain.errors import ConfigError, Interrupted

CODES = "DISTTRAIN_EXIT_CODES"
"""Names the folder into which the ranks of this host write their exit codes."""

FINAL = (2, Interrupted.exit_code)
"""Exit codes after which to start again would change nothing."""

OTHERS_STOP_WITHIN_S = 2.0
"""After a rank was stopped by a signal: those of its host get the same answer at the same step."""
RANK_NAME = "disttrain-rank"
"""What `ps -e` and `top` show of a rank."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
_SIGNALS = tuple(signal.Signals[name] for name in SIGNALS.split(","))
RENDEZVOUS = "last_call_timeout=1,join_timeout=600,close_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
"""A lost host is noticed after 3 s and the others go on after 1 s more; torchrun's own settings take 40 s for that."""


def torchrun_words(
    ranks: int, *, nodes: str, endpoint: str | None, run_id: str, max_restarts: int, opens_store: bool = True
) -> list[str]:
    """Return torchrun's options: for this host alone, or for `nodes` of them (N or MIN:MAX) that meet at `endpoint`.

    There one of them opens a store, unless `opens_store` says that one runs there already.
    """
    words = ["--nproc-per-node", str(ranks), "--max-restarts", str(max_restarts), "--monitor-interval", "0.2"]
    words += ["--signals-to-handle", SIGNALS]
    if endpoint is None:
        return ["--standalone", *words]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", run_id]
    meeting += ["--rdzv-conf", RENDEZVOUS if opens_store else f"{RENDEZVOUS},is_host=false"]
    return ["--nnodes", nodes, *words, *meeting]


def run_torchrun(
    words: Sequence[str],
    module: str,
    arguments: Sequence[str],
    variables: Mapping[str, str],
    preload: Sequence[str],
    *,
    grace_s: int | None = None,
) -> int:
    """Run `torchrun WORDS -m MODULE ARGUMENTS` here, printed first; return the exit code of its ranks on this host.

    After a signal ranks have `grace_s` until they are killed; None: as the environment says, or torchrun.

    A rank calls the module's `main(arguments)` and exits with what that returns, in a process that has imported the
    modules `preload` already; an import that has an effect has no place among them.
    """
    if grace_s is not None:
        variables = {**variables, **set_grace(grace_s)}
    settings = [f"{name}={os.environ.setdefault(name, value)}" for name, value in variables.items()]
    print(shlex.join([*settings, "torchrun", *words, "-m", module, *arguments]), flush=True)
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    from disttrain.backend import elastic  # imports torchrun's parts

    elastic.register()
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).addFilter(_keep_off)
    # What torchrun itself makes of --standalone.
    alone = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", str(uuid.uuid4())]
    words = [option for word in words for option in (alone if word == "--standalone" else [word])]
    with tempfile.TemporaryDirectory(prefix="disttrain-") as folder:
        os.environ[CODES] = folder
        _start_server(preload)  # its environment is what ranks have, and what torchrun adds to it
        signalled = False
        try:
            parse: Callable[[list[str]], object] = torchrun.parse_args
            config_of: Callable[[object], tuple[Any, Any, Any]] = torchrun.config_from_args
            config, _, _ = config_of(parse([*words, "--start-method", "forkserver", "-m", module]))
            config.rdzv_backend = elastic.NAME
            with _no_main_module():
                _wait_for_server()
                elastic_launch(config, _be_rank)(module, list(arguments), multiprocessing.get_start_method())
        except ChildFailedError as error:
            killed = any(failure.exitcode < 0 for failure in error.failures.values())
            return 1 if killed else _code(Path(folder)) or 1
        except (SignalException, KeyboardInterrupt):
            signalled = True
            _see_ranks_end()
        finally:
            del os.environ[CODES]
        code = _code(Path(folder))
        return Interrupted.exit_code if code is None and signalled else code or 0


def set_grace(grace_s: int) -> dict[str, str]:
    """Let torchrun and its ranks know how long ranks have from a signal to SIGKILL; return the variable.

    *Errors*: ConfigError where torchrun, before torch 2.13, always takes its 30 s.
    """
    if not environment.TORCHRUN_LISTENS and grace_s != environment.TORCHRUNS_GRACE_S:
        only = f"{environment.TORCHRUNS_GRACE_S:.0f}"
        raise ConfigError(
            f"--grace {grace_s}: expected {only} or nothing with torch {torch.__version__}, whose torchrun takes no "
            "other; use torch 2.13 or newer"
        )
    first, name = environment.GRACE
    os.environ.pop(first, None)
    os.environ[name] = str(grace_s)
    return {name: str(grace_s)}


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Let processes start without this program's main module, which would be run again in each, with a warning.

    `multiprocessing.spawn` does that for all but those that are called so.
    """
    main = sys.modules["__main__"]
    spec, main.__spec__ = main.__spec__, ModuleSpec("disttrain.__main__", None)
    try:
        yield
    finally:
        main.__spec__ = spec


def _see_ranks_end() -> None:
    """Give ranks that save the time that torchrun gives them: a second signal breaks off its own waiting.

    Batch systems send one to every process and one more by way of srun, and ranks do not outlive this process.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end = time.monotonic() + environment.grace_s(of_torchrun=True)
    for rank in multiprocessing.active_children():
        rank.terminate()  # where the second signal came before torchrun had passed on the first
        rank.join(max(0.0, end - time.monotonic()))
        rank.kill()


def _start_server(preload: Sequence[str]) -> None:
    """Start the process that ranks are forked off; signals that a whole group of processes gets do not end it."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    resource_tracker.ensure_running()  # first: starting it unblocks SIGTERM, and the server starts it where it is not
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_for_server() -> None:
    """Return when the server has imported all: hosts that train already go on until this one is of use to them."""
    first = multiprocessing.get_context("forkserver").Process(target=_nothing)
    first.start()
    first.join()


def _nothing() -> None:
    return


def _be_rank(module: str, arguments: list[str], method: str) -> None:
    if sys.platform == "linux":
        Path("/proc/self/comm").write_text(RANK_NAME)  # the command line is its server's
    as_if_started_by_hand(method)
    threading.Thread(target=_end_with_launcher, name="disttrain-launcher-watch", daemon=True).start()
    # Ranks would keep their server alive when the launcher is killed; so it ends too, some seconds later, and takes
    # along a rank in which no thread gets to run.
    server: Any = getattr(forkserver, "_forkserver", None)
    if server is not None and server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    there: Any = importlib.import_module(module)
    sys.argv = [str(there.__file__), *arguments]
    code = there.main(arguments)
    sys.stdout.flush()
    if code:
        sys.exit(code)
    if _said() == Interrupted.exit_code:
        # What follows waits until all ranks of this host have ended. But an agent that sent the signal, because hosts
        # came, waits for the end of this process, for 30 s.
        leaves = threading.Timer(OTHERS_STOP_WITHIN_S, os._exit, [Interrupted.exit_code])
        leaves.daemon = True
        leaves.start()


def _end_with_launcher() -> None:
    """End this process, whatever it does, when the launcher is gone: others take up its run."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        launcher.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _said() -> int | None:
    """Return the exit code that this rank has left word of."""
    folder = os.environ.get(CODES)
    word = Path(folder, os.environ["LOCAL_RANK"]) if folder is not None else None
    return int(word.read_text()) if word is not None and word.exists() else None


def leave(code: int) -> int:
    """Tell the launcher of this rank how it ended; return what the process is to exit with."""
    folder = os.environ.get(CODES)
    if folder is None or "RANK" not in os.environ:
        return code
    Path(folder, os.environ.get("LOCAL_RANK", "0")).write_text(str(code))
    return 0 if code in FINAL else code


def _code(folder: Path) -> int | None:
    """Return what the ranks of this host ended with: the first that is not 0; None where none came so far."""
    codes = [int(path.read_text() or "1") for path in sorted(folder.iterdir())]
    return next((code for code in codes if code), 0) if codes else None


def _keep_off(record: logging.LogRecord) -> bool:
    """Keep what torchrun's agent logs off the screen; tell of a rank that was killed, which could not itself."""
    code, local_rank = (*record.args, None, None)[:2] if isinstance(record.args, tuple) else (None, None)
    if str(record.msg).startswith("failed (exitcode") and isinstance(code, int) and code < 0:
        name = signal.Signals(-code).name
        print(f"the rank with local rank {local_rank} was ended by {name}", file=sys.stderr)
    return False
