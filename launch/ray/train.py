#!/usr/bin/env python3
"""Train by Ray Train's TorchTrainer: train.py [--workers N] [--gpus N] [--max-failures N] CFG.PY [WORD...]

WORDs are the arguments of `python -m disttrain.launch`. All workers must see the cfg.py and the run directory under the
same paths. The program exits with the run's exit code. The same command resumes the run, with any number of workers.

--workers N       ranks (1)
--gpus N          GPUs of each rank: 1 for NCCL, 0 for gloo (0)
--max-failures N  how often Ray starts the workers again when one dies (3)
--storage DIR     where Ray keeps its own notes on the run (~/ray_results)
--address A       the Ray cluster; "auto" is the one of this machine (default: RAY_ADDRESS, or a Ray of its own)

A worker that Ray lost costs the steps since the last checkpoint, as no signal warns it: set checkpoint.every_s.
"""

import argparse
import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disttrain.process import SETTINGS  # it imports nothing

MISTAKE, INTERRUPTED = 2, 75
"""Exit codes after which a restart would change nothing, or is for you to decide."""


def main() -> int:
    """Start the workers, wait until they end, and return the run's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--max-failures", type=int, default=3)
    parser.add_argument("--storage")
    parser.add_argument("--address")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="CFG.PY [WORD...]")
    options = parser.parse_args()
    if not options.words or options.workers < 1:
        parser.error("expected at least one worker and a CFG.PY")
    if starting := [word for word in options.words if word.split("=")[0] in ("--ranks", "--nodes", "--rdzv")]:
        parser.error(f"Ray starts the ranks: expected --workers N in front of the CFG.PY, got {starting[0]}")
    words = with_absolute_paths(options.words)
    if code := os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-m", "disttrain.launch", "--check", *words]):
        return code  # a mistake, reported once and before a cluster is asked for anything

    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    # A worker's hash seed and threads must be there when its interpreter starts. By the id, workers that are started
    # again know that --fresh has been obeyed.
    variables = {**SETTINGS, "DISTTRAIN_LAUNCH_ID": str(uuid.uuid4())}
    ray.init(address=options.address, runtime_env={"env_vars": variables})
    trainer = trainer_class()(
        train_on_worker,
        train_loop_config={"words": words},
        torch_config=torch_config(),
        scaling_config=ScalingConfig(
            num_workers=options.workers,
            use_gpu=options.gpus > 0,
            resources_per_worker={"CPU": 1, **({"GPU": options.gpus} if options.gpus else {})},
        ),
        run_config=RunConfig(
            storage_path=options.storage, failure_config=FailureConfig(max_failures=options.max_failures)
        ),
    )
    try:
        result = trainer.fit()
    except Exception as error:  # noqa: BLE001 - Ray has printed the errors of the workers
        print(f"Ray gave the run up: {type(error).__name__}; see the workers' errors above", file=sys.stderr)
        return 1
    return int(result.return_value)


def with_absolute_paths(words: list[str]) -> list[str]:
    """Return the words with absolute paths: workers start in a folder of Ray's."""
    words = list(words)
    for number, word in enumerate(words):
        if Path(word).exists():
            words[number] = str(Path(word).resolve())
    if "--runs" in words[:-1]:
        at = words.index("--runs") + 1
        words[at] = str(Path(words[at]).resolve())
    elif not any(word.startswith("--runs=") for word in words):
        words += ["--runs", str(Path("runs").resolve())]
    return words


def trainer_class() -> Any:
    from ray.train.torch import TorchTrainer

    return TorchTrainer


def torch_config() -> Any:
    """Return a TorchConfig that gives each worker the variables of its rank and leaves connecting to disttrain."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class RanksOnly(Backend):
        share_cuda_visible_devices = True

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            address, port = worker_group.execute_single(0, address_and_port)
            worker_group.execute(set_variables, address, port)

    @dataclass
    class Config(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return RanksOnly

    return Config()


def address_and_port() -> tuple[str, int]:
    """Return an address of this worker's machine, and a free port on it."""
    import socket

    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def set_variables(address: str, port: int) -> None:
    """Set the variables of a rank, as torchrun would."""
    import ray.train

    context = ray.train.get_context()
    numbers = {
        "RANK": context.get_world_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "GROUP_RANK": context.get_node_rank(),
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR=address)


def train_on_worker(settings: dict[str, Any]) -> int:
    """Train as one rank and return the exit code; Ray starts all workers again if this raises."""
    from disttrain.commands.launch import main as launch

    code = launch(settings["words"])
    if code not in (0, MISTAKE, INTERRUPTED):
        raise RuntimeError(f"the run failed with exit code {code}; its last checkpoint is kept")
    return code


if __name__ == "__main__":
    sys.exit(main())
