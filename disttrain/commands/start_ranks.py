"""`disttrain launch --ranks N cfg.py`: start the ranks of a run by torchrun, with the settings that a run needs."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from disttrain.config import Config, load_config
from disttrain.environment import grace_s as grace_of_launcher
from disttrain.errors import ConfigError
from disttrain.launching.pet_variables import hosts_as_set
from disttrain.launching.torchrun import run_torchrun, torchrun_words
from disttrain.process import SETTINGS, set_process_variables

PRELOAD = ("disttrain.commands.launch", "disttrain.commands.main", "torch.nn.parallel", "torch._dynamo.config")
"""Modules that every rank imports sooner or later; optimizers and DDP import the last one at their first use."""

DEFAULT_SILENCE_S, LEAST_SILENCE_S, LONGEST_SILENCE_S = 10.0, 1.0, 3600.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that start ranks to the parser of `launch`."""
    ranks = parser.add_argument_group(
        "ranks", "start the ranks from here, by torchrun, and exit with the run's exit code"
    )
    ranks.add_argument("--ranks", metavar="N", type=int, help="number of ranks on this host")
    ranks.add_argument(
        "--max-restarts", metavar="N", type=int, help="how often ranks that died are restarted (default: 3)"
    )
    ranks.add_argument(
        "--grace", metavar="S", type=int, help="seconds from a signal to SIGKILL (default with --ranks: torchrun's, 30)"
    )
    ranks.add_argument(
        "--nodes", metavar="N", help="number of hosts, or MIN:MAX; use the same on every host (default: 1)"
    )
    ranks.add_argument("--rdzv", metavar="HOST:PORT", help="rendezvous of several hosts: an address of one of them")
    ranks.add_argument(
        "--no-rdzv-host", action="store_true", help="open no store at HOST:PORT, because one runs there already"
    )
    ranks.add_argument(
        "--recover", action="store_true", help="when a rank dies, the others go on in place, without a restart"
    )
    ranks.add_argument(
        "--silence",
        metavar="S",
        type=float,
        help="with --recover: seconds without a sign of life after which a rank or a host is left out (default: 10)",
    )
    parser.set_defaults(opens_store=None)


def take_defaults(options: argparse.Namespace) -> None:
    """Take ranks, hosts and rendezvous from torchrun's variables (PET_NNODES, ...) where all are there and none typed.

    What is taken is printed, as it would be typed.
    """
    if options.nodes is not None or options.rdzv is not None or (found := hosts_as_set(options.ranks)) is None:
        return
    given, options.ranks = options.ranks, found.ranks
    options.nodes, options.rdzv, options.opens_store = found.nodes, found.endpoint, found.opens_store
    if options.max_restarts is None:
        options.max_restarts = found.max_restarts
    words = [f"--ranks {found.ranks}"] * (given is None) + [f"--nodes {found.nodes} --rdzv {found.endpoint}"] * (
        found.endpoint is not None
    )
    if words:
        print(f"from the environment's PET_ variables: {' '.join(words)}", flush=True)


def start_ranks(options: argparse.Namespace) -> int:
    """Start the ranks that the options ask for, wait until they end, and return the run's exit code."""
    nodes = options.nodes or "1"
    if options.ranks < 1:
        raise ConfigError(f"expected --ranks to be at least 1, got {options.ranks}")
    if (nodes != "1") != (options.rdzv is not None):
        raise ConfigError(
            f"expected --nodes and --rdzv together, got --nodes {nodes} and --rdzv {options.rdzv}; "
            "one host needs neither, several need both"
        )
    silence_s = silence_of(options)
    grace_of_launcher(in_agent=True)  # refuse an unreadable variable here; torchrun would fail with a traceback
    config = load_config(Path(options.config), options.overrides)  # report a mistake once, and not on every rank
    words = torchrun_words(
        options.ranks,
        nodes=nodes,
        endpoint=options.rdzv,
        opens_store=False if options.no_rdzv_host else options.opens_store,
        run_id=str(config.name),
        max_restarts=3 if options.max_restarts is None else options.max_restarts,
        recover=options.recover,
    )
    arguments = [options.config, *options.overrides, "--runs", str(options.runs)]
    arguments += ["--fresh"] * options.fresh + ["--traceback"] * options.traceback
    return run_ranks(words, "disttrain.launch", arguments, config, grace_s=options.grace, silence_s=silence_s)


def silence_of(options: argparse.Namespace) -> float | None:
    """Return the seconds of silence after which a rank is left out; None for a launch that does not recover in place.

    *Errors*: ConfigError for a silence without --recover, or out of bounds.
    """
    if not options.recover:
        if options.silence is not None:
            raise ConfigError(f"expected --silence {options.silence:g} with --recover, got it alone; add --recover")
        return None
    silence_s = DEFAULT_SILENCE_S if options.silence is None else float(options.silence)
    if not LEAST_SILENCE_S <= silence_s <= LONGEST_SILENCE_S:
        raise ConfigError(
            f"expected --silence to be from {LEAST_SILENCE_S:g} to {LONGEST_SILENCE_S:g} seconds, got {silence_s:g}"
        )
    return silence_s


def run_ranks(
    words: Sequence[str],
    module: str,
    arguments: Sequence[str],
    config: Config,
    *,
    grace_s: int | None = None,
    silence_s: float | None = None,
) -> int:
    """Run `main(arguments)` of a module on the ranks that torchrun's `words` start; return their exit code."""
    set_process_variables()  # the ranks get them from the process off which they are forked
    variables = {"OMP_NUM_THREADS": SETTINGS["OMP_NUM_THREADS"], "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    preload = [*PRELOAD, *modules_for(config)]
    return run_torchrun(words, module, arguments, variables, preload, grace_s=grace_s, silence_s=silence_s)


def modules_for(config: Config) -> list[str]:
    """Return the modules beside `PRELOAD` that every rank of a run of this config imports."""
    return ["torchmetrics"] if config.metrics or config.train_metrics else []
