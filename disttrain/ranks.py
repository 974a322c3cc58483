"""`disttrain launch --ranks N cfg.py`: the ranks of a run for those who do not want to learn torchrun."""

import argparse
from pathlib import Path

from disttrain.backend.environment import grace_s
from disttrain.backend.torchrun import run_torchrun, torchrun_words
from disttrain.config import load_config
from disttrain.errors import ConfigError

PRELOAD = ("disttrain.launch", "disttrain.cli", "torch.nn.parallel", "torch._dynamo.config")
"""What every rank imports sooner or later; the last is what optimizers and DDP import at their first use."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that start ranks."""
    ranks = parser.add_argument_group("ranks", "start them from here, by torchrun, and end with the run's exit code")
    ranks.add_argument("--ranks", metavar="N", type=int, help="processes on this host")
    ranks.add_argument("--max-restarts", metavar="N", type=int, default=3, help="how often dead ranks start again (3)")
    ranks.add_argument(
        "--grace", metavar="S", type=int, help="seconds from a signal to SIGKILL (with --ranks 30, as torchrun)"
    )
    ranks.add_argument("--nodes", metavar="N", default="1", help="hosts, or MIN:MAX of them; type the same on each (1)")
    ranks.add_argument("--rdzv", metavar="HOST:PORT", help="where several hosts meet: an address of one of them")
    ranks.add_argument("--no-rdzv-host", action="store_true", help="a store runs at HOST:PORT already: open none there")


def on_ranks(options: argparse.Namespace) -> int:
    """Start the ranks that the options ask for, wait for their end, and return the run's exit code."""
    if options.ranks < 1:
        raise ConfigError(f"expected --ranks to be at least 1, got {options.ranks}")
    if (options.nodes != "1") != (options.rdzv is not None):
        raise ConfigError(
            f"expected --nodes and --rdzv together, got --nodes {options.nodes} and --rdzv {options.rdzv}; "
            "one host needs neither, several need both"
        )
    grace_s(of_torchrun=True)  # a variable that cannot be read is refused before torchrun stumbles over it
    config = load_config(Path(options.config), options.overrides)  # a mistake is better said once than by every rank
    words = torchrun_words(
        options.ranks,
        nodes=options.nodes,
        endpoint=options.rdzv,
        opens_store=not options.no_rdzv_host,
        run_id=str(config.name),
        max_restarts=options.max_restarts,
    )
    arguments = [options.config, *options.overrides, "--runs", str(options.runs)]
    arguments += ["--fresh"] * options.fresh + ["--traceback"] * options.traceback
    variables = {"OMP_NUM_THREADS": str(config.cpu_threads), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    preload = [*PRELOAD, *["torchmetrics"] * bool(config.metrics)]
    return run_torchrun(words, "disttrain.launch", arguments, variables, preload, grace_s=options.grace)
