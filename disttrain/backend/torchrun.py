"""torchrun in this process, with what experience says that its ranks need, and the exit code of a run.

*Contract*: `run_torchrun` starts ranks, watches them, starts them again when one dies, and returns the exit code that
the run's ranks ended with; torchrun itself returns 1 for whatever is not 0. A rank says its code with `leave`, which
also lets torchrun take it for well done where to start again would change nothing: after a signal, after a mistake.

*How*: what torchrun writes about a rank that failed is left out, for that rank has said why; a rank that was killed
could not, so that is said in one line.

*Source*: torch.distributed.run and torch.distributed.elastic.
"""

import logging
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from disttrain.errors import Interrupted

CODES = "DISTTRAIN_EXIT_CODES"
"""Names the folder into which the ranks of this host write their exit codes."""

FINAL = (2, Interrupted.exit_code)
"""Exit codes after which to start again would change nothing."""

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
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


def run_torchrun(words: Sequence[str], module: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run `torchrun WORDS -m MODULE` here, printed first; return the exit code of its ranks on this host."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    settings = [f"{name}={os.environ.setdefault(name, value)}" for name, value in variables.items()]
    print(shlex.join([*settings, "torchrun", *words, "-m", *module]), flush=True)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).addFilter(_keep_off)
    with tempfile.TemporaryDirectory(prefix="disttrain-") as folder:
        os.environ[CODES] = folder
        signalled = False
        try:
            main: Callable[[object], None] = torchrun.run
            parse: Callable[[list[str]], object] = torchrun.parse_args
            main(parse([*words, "-m", *module]))
        except ChildFailedError as error:
            killed = any(failure.exitcode < 0 for failure in error.failures.values())
            return 1 if killed else _code(Path(folder)) or 1
        except (SignalException, KeyboardInterrupt):
            signalled = True
        finally:
            del os.environ[CODES]
        code = _code(Path(folder))
        return Interrupted.exit_code if code is None and signalled else code or 0


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
