"""Runs torchrun in this process, with ranks that start fast, and returns the exit code of the run.

*Contract*: `run_torchrun` starts ranks, watches them, restarts them when one dies, and returns the exit code of the
run's ranks; torchrun itself returns 1 for every code but 0. A rank reports its code with `report_exit_code`. After a
signal or a user's mistake a restart would change nothing, so the rank then exits with 0 and torchrun does not restart.

*How*: torchrun's messages about a failed rank are suppressed, because the rank has printed its error. A killed rank
could not print anything, so one line names it. A new interpreter a rank would import torch, and what an optimizer and
DDP import at their first use, for 4 s of a core. So ranks are forked off one process per host, the server, which has
imported these modules and has run nothing. The server ends with this process, and the ranks end with the server.

*Environment*: this file reads and sets variables, as `environment.py` and `pet_variables.py` do. It sets those of its
ranks, and the folder through which they report their exit codes.

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
from functools import partial
from importlib.machinery import ModuleSpec
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import torch

from disttrain import environment
from disttrain.errors import ConfigError, Interrupted
from disttrain.files import keep_socket_paths_short
from disttrain.launching.killed_ranks import KilledRanks, suppress
from disttrain.launching.local_ranks import as_if_started_by_hand
from disttrain.launching.pet_variables import hidden_variables

_EXIT_CODES_FOLDER = "DISTTRAIN_EXIT_CODES"
"""The variable that holds the folder into which the ranks of this host write their exit codes."""

_FINAL_CODES = (2, Interrupted.exit_code)
"""Exit codes after which a restart would change nothing."""


_OTHERS_STOP_WITHIN_S = 2.0
"""How long a rank that a signal stopped waits for the other ranks of its host; they stop at the same step."""
RANK_NAME = "disttrain-rank"
"""The name of a rank's process in `ps -e` and `top`."""
_SIGNAL_NAMES = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
_SIGNALS = tuple(signal.Signals[name] for name in _SIGNAL_NAMES.split(","))
RENDEZVOUS = "last_call_timeout=1,join_timeout=600,close_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
"""Agents notice a lost host after 3 s and restart 1 s later; torchrun's own settings take 40 s for that."""


def torchrun_words(
    ranks: int,
    *,
    nodes: str,
    endpoint: str | None,
    run_id: str,
    max_restarts: int,
    opens_store: bool | None = None,
    recover: bool = False,
) -> list[str]:
    """Return torchrun's options: for this host alone, or for `nodes` hosts (N or MIN:MAX) that meet at `endpoint`.

    The host at `endpoint` opens a store there, which torchrun knows by the address, or by `opens_store`: this host does
    or does not. `recover`: the agent waits for the end of a rank by itself, and not by looking now and then.
    """
    interval = "0.01" if recover else "0.2"
    words = ["--nproc-per-node", str(ranks), "--max-restarts", str(max_restarts), "--monitor-interval", interval]
    words += ["--signals-to-handle", _SIGNAL_NAMES]
    if endpoint is None:
        return ["--standalone", *words]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", run_id]
    is_host = "" if opens_store is None else f",is_host={str(opens_store).lower()}"
    rendezvous += ["--rdzv-conf", RENDEZVOUS + is_host]
    return ["--nnodes", nodes, *words, *rendezvous]


def run_torchrun(
    words: Sequence[str],
    module: str,
    arguments: Sequence[str],
    variables: Mapping[str, str],
    preload: Sequence[str],
    *,
    grace_s: int | None = None,
    silence_s: float | None = None,
) -> int:
    """Print and run `torchrun WORDS -m MODULE ARGUMENTS`; return the exit code of its ranks on this host.

    After a signal ranks have `grace_s` until they are killed; None: the environment's value, or torchrun's default.
    With `silence_s` ranks that die are replaced, and the others recover in place; one that gives no sign of life for so
    long is left out.

    A rank calls the module's `main(arguments)` and exits with the code that it returns. The rank's process has already
    imported the modules `preload`; their imports must have no effect.
    """
    if grace_s is not None:
        variables = {**variables, **_set_grace(grace_s)}
    settings = [f"{name}={os.environ.setdefault(name, value)}" for name, value in variables.items()]
    note = "" if silence_s is None else "  # and ranks that recover in place, which torchrun by itself does not have"
    print(shlex.join([*settings, "torchrun", *words, "-m", module, *arguments]) + note, flush=True)
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    from disttrain.launching import elastic, recovering_agent  # they import torchrun's modules

    elastic.register()
    reports = suppress if silence_s is not None else KilledRanks().report
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).addFilter(reports)
    # These are the options for which torchrun's --standalone stands.
    standalone = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", str(uuid.uuid4())]
    words = [option for word in words for option in (standalone if word == "--standalone" else [word])]
    with tempfile.TemporaryDirectory(prefix="disttrain-") as folder:
        os.environ[_EXIT_CODES_FOLDER] = folder
        _start_server(preload)  # after the variables: ranks have the server's environment, and torchrun's variables
        signalled = False
        agent: Callable[..., Any] = elastic.PoliteAgent
        if silence_s is not None:
            agent = partial(recovering_agent.RecoveringAgent, silence_s, Path(folder))
        try:
            parse: Callable[[list[str]], object] = torchrun.parse_args
            config_of: Callable[[object], tuple[Any, Any, Any]] = torchrun.config_from_args
            with hidden_variables():
                config, _, _ = config_of(parse([*words, "--start-method", "forkserver", "-m", module]))
            config.rdzv_backend = elastic.NAME
            with _no_main_module(), elastic.agents_by(agent):
                _wait_for_server()
                elastic_launch(config, _run_rank)(module, list(arguments), multiprocessing.get_start_method())
        except ChildFailedError as error:
            killed = any(failure.exitcode < 0 for failure in error.failures.values())
            return 1 if killed else _exit_code_in(Path(folder)) or 1
        except (SignalException, KeyboardInterrupt):
            signalled = True
            _wait_for_ranks()
        finally:
            del os.environ[_EXIT_CODES_FOLDER]
        code = _exit_code_in(Path(folder))
        return Interrupted.exit_code if code is None and signalled else code or 0


def _set_grace(grace_s: int) -> dict[str, str]:
    """Set the variable that gives ranks `grace_s` from a signal to SIGKILL; return its name and value.

    *Errors*: ConfigError before torch 2.13, whose torchrun always waits 30 s.
    """
    if not environment.TORCHRUN_READS_GRACE and grace_s != environment.DEFAULT_GRACE_S:
        only = f"{environment.DEFAULT_GRACE_S:.0f}"
        raise ConfigError(
            f"--grace {grace_s}: expected {only} or nothing with torch {torch.__version__}, whose torchrun takes no "
            "other; use torch 2.13 or newer"
        )
    winner, name = environment.GRACE_VARIABLES
    os.environ.pop(winner, None)
    os.environ[name] = str(grace_s)
    return {name: str(grace_s)}


@contextmanager
def _no_main_module() -> Iterator[None]:
    """Hide this program's main module from processes that start; each would run it again, with a warning.

    `multiprocessing.spawn` runs every main module again, except one whose name ends in `.__main__`.
    """
    main = sys.modules["__main__"]
    spec, main.__spec__ = main.__spec__, ModuleSpec("disttrain.__main__", None)
    try:
        yield
    finally:
        main.__spec__ = spec


def _wait_for_ranks() -> None:
    """Wait for ranks that save, as long as torchrun would have: a second signal has ended its own wait.

    Batch systems send a signal to every process, and srun sends another. Ranks do not outlive this process.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    deadline = time.monotonic() + environment.grace_s(in_agent=True)
    for rank in multiprocessing.active_children():
        rank.terminate()  # the second signal may have come before torchrun sent the first one to the ranks
        rank.join(max(0.0, deadline - time.monotonic()))
        rank.kill()


def _start_server(preload: Sequence[str]) -> None:
    """Start the process off which ranks are forked; signals to its whole process group do not end it."""
    keep_socket_paths_short()
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    resource_tracker.ensure_running()  # first: starting it unblocks SIGTERM, and the server would start it otherwise
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_for_server() -> None:
    """Wait until the server has imported its modules; meanwhile the other hosts train without this one."""
    first = multiprocessing.get_context("forkserver").Process(target=_do_nothing)
    first.start()
    first.join()


def _do_nothing() -> None:
    return


def _run_rank(module: str, arguments: list[str], method: str) -> None:
    if sys.platform == "linux":
        Path("/proc/self/comm").write_text(RANK_NAME)  # its command line is the server's
    as_if_started_by_hand(method)
    threading.Thread(target=_end_with_launcher, name="disttrain-launcher-watch", daemon=True).start()
    # The server lives as long as a rank holds this descriptor. Without it the server ends some seconds after a killed
    # launcher, and takes along a rank in which no thread gets to run.
    server: Any = getattr(forkserver, "_forkserver", None)
    if server is not None and server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it was closed when the launcher began
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    program: Any = importlib.import_module(module)
    sys.argv = [str(program.__file__), *arguments]
    code = program.main(arguments)
    if sys.stdout is not None:
        sys.stdout.flush()
    if code:
        sys.exit(code)
    if _reported_code() == Interrupted.exit_code:
        # torch's code after this function waits until all ranks of this host have ended. But an agent that signals its
        # ranks because new hosts joined waits up to 30 s for the end of this process. So this timer ends it.
        timer = threading.Timer(_OTHERS_STOP_WITHIN_S, os._exit, [Interrupted.exit_code])
        timer.daemon = True
        timer.start()


def _end_with_launcher() -> None:
    """Kill this process when its launcher has ended, whatever it does: a new launch may resume its run."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        launcher.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _reported_code() -> int | None:
    """Return the exit code that this rank has reported; None if it has not."""
    folder = os.environ.get(_EXIT_CODES_FOLDER)
    report = Path(folder, os.environ["LOCAL_RANK"]) if folder is not None else None
    return int(report.read_text()) if report is not None and report.exists() else None


def report_exit_code(code: int) -> int:
    """Write this rank's exit code for its launcher; return the code with which the process must exit."""
    folder = os.environ.get(_EXIT_CODES_FOLDER)
    if folder is None or "RANK" not in os.environ:
        return code
    Path(folder, os.environ.get("LOCAL_RANK", "0")).write_text(str(code))
    return 0 if code in _FINAL_CODES else code


def _exit_code_in(folder: Path) -> int | None:
    """Return the first code but 0 that a rank of this host has reported, else 0; None without a report."""
    codes = [int(path.read_text() or "1") for path in sorted(folder.iterdir())]
    return next((code for code in codes if code), 0) if codes else None
