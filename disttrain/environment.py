"""The reader of environment variables: the launch by torchrun or Slurm that this process belongs to.

*Contract*: nothing else in the package reads a variable, except `launching/torchrun.py`, which sets them for its ranks,
`launching/pet_variables.py` and `launching/recovery_variables.py`, which read those of torchrun's options and of
recovery in place, and `process.py`, which sets those that a process must have from its start.
`read_launch` is a function of the mapping that it gets. torchrun's variables win over Slurm's, because one agent per
node inside `srun` is common. Slurm's variables count only in a step that `srun` started with several tasks: a batch
script, or `srun --pty bash`, is one process.

*Errors*: BackendError for variables that are half-set or contradict each other, with their names and values.

*Source*: torch.distributed.run's page "Environment Variables"; srun(1), "OUTPUT ENVIRONMENT VARIABLES".
"""

import math
import multiprocessing
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from disttrain.errors import BackendError, ConfigError

GRACE_VARIABLES = ("PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
"""The variables that set how long torchrun waits for ranks before it kills them; the first wins."""
DEFAULT_GRACE_S = 30.0
"""How long torchrun waits if neither variable is set."""
LONGEST_GRACE_S = 7 * 86400
TORCHRUN_READS_GRACE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
"""Older versions of torchrun ignore the variables and always wait 30 s."""

_CORE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
_LAUNCHER_PREFIXES = ("DISTTRAIN_RECOVERY_", "TORCHELASTIC_", "SLURM_", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_")


@dataclass(frozen=True)
class Topology:
    """The rank of this process and the sizes of its world; the defaults describe one process alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1


@dataclass(frozen=True)
class Launch:
    """The launch of this process: its topology, and the address at which the ranks meet.

    `has_agent_store`: torchrun's agent keeps a store at `address:port`; otherwise rank 0 opens one there.
    """

    launcher: Literal["torchrun", "slurm"]
    topology: Topology
    address: str
    port: int
    has_agent_store: bool = False
    restarts: int = 0


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """Return the launch that the variables describe; None for a process that was started by hand."""
    if any(name in environ for name in _CORE):
        return _read_torchrun(environ)
    if "SLURM_PROCID" in environ and "SLURM_STEP_NODELIST" in environ and _num_tasks(environ) > 1:
        return _read_slurm(environ)
    return None


def pjrt_device(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the device that torch_xla is to use, such as "TPU" or "CPU"; None if the variable is not set."""
    return environ.get("PJRT_DEVICE") or None


def grace_s(environ: Mapping[str, str] = os.environ, *, in_agent: bool = False) -> float:
    """Return how many seconds a rank has from a signal to SIGKILL; inf if no variable and no torchrun limits it.

    `in_agent`: this process is torchrun's agent, not one of its ranks.

    torchrun's variables decide; without them its default holds under torchrun. torchrun before torch 2.13 ignores the
    variables. An option on torchrun's own command line is not visible here.

    *Errors*: ConfigError for a value that is not a number of seconds, or is over a week.
    """
    under_torchrun = in_agent or "TORCHELASTIC_RUN_ID" in environ
    for name in GRACE_VARIABLES:
        if under_torchrun and not TORCHRUN_READS_GRACE:
            break
        if text := environ.get(name):
            if not text.isdecimal() or int(text) > LONGEST_GRACE_S:
                raise ConfigError(
                    f"expected {name} to be from 0 to {LONGEST_GRACE_S} seconds, got {text!r}; set another, or unset it"
                )
            return float(text)
    return DEFAULT_GRACE_S if under_torchrun else math.inf


def launch_ids(environ: Mapping[str, str] = os.environ) -> dict[str, bool]:
    """Return ids of the launch that this process belongs to; empty for a process that was started by hand.

    The value of an id is True if this launch began every run that carries the id. The id of torchrun's agent is
    certain: the agent outlives its ranks, and `TORCHELASTIC_RESTART_COUNT` stays 0 when hosts join or leave. The id of
    a Slurm job is certain once the job was requeued; before that, one job may launch many runs.
    `DISTTRAIN_LAUNCH_ID` is for launchers that start ranks again by themselves, and who sets it vouches for it.
    """
    ids = {}
    if "TORCHELASTIC_RUN_ID" in environ:
        ids[f"torchrun {environ['TORCHELASTIC_RUN_ID']} on {socket.gethostname()}, {_parent()}"] = True
    if own := environ.get("DISTTRAIN_LAUNCH_ID"):
        ids[f"launch {own}"] = True
    if "SLURM_JOB_ID" in environ:
        ids[f"Slurm job {environ['SLURM_JOB_ID']}"] = _integer(environ, "SLURM_RESTART_COUNT", 0) > 0
    return ids


def _parent() -> str:
    """Return the id and the start time of the process that started this one: the system reuses ids."""
    launcher = multiprocessing.parent_process()  # getppid() of a forked rank is the fork server's
    pid = os.getppid() if launcher is None else launcher.pid
    stat = Path(f"/proc/{pid}/stat")
    started = stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else "?"
    return f"process {pid} of tick {started}"


def set_default(name: str, value: str) -> str:
    """Set a variable that a library reads, unless the user has set it; return its value."""
    return os.environ.setdefault(name, value)


def variables_with(changes: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of this process with `changes`, for a process that it starts."""
    return {**os.environ, **changes}


def set_launch(topology: Topology, address: str, port: int) -> None:
    """Set this process's variables as torchrun would; a world of one looks like a process started by hand."""
    for name in [name for name in os.environ if name in (*_CORE, *_ADDRESS) or name.startswith(_LAUNCHER_PREFIXES)]:
        del os.environ[name]
    if topology.world_size > 1:
        numbers = (topology.rank, topology.world_size, topology.local_rank, topology.local_world_size)
        os.environ.update({name: str(number) for name, number in zip(_CORE, numbers, strict=True)})
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))


def _read_torchrun(environ: Mapping[str, str]) -> Launch:
    missing = [name for name in (*_CORE, *_ADDRESS) if not environ.get(name)]
    if missing:
        present = [f"{name}={environ[name]}" for name in (*_CORE, *_ADDRESS) if environ.get(name)]
        raise BackendError(
            f"expected all of {', '.join((*_CORE, *_ADDRESS))} in the environment, got "
            f"{', '.join(present) or 'none set'} without {', '.join(missing)}; "
            "start with torchrun, set the missing ones, or unset all for one process"
        )
    rank, world_size, local_rank, local_world_size = (_integer(environ, name) for name in _CORE)
    topology = Topology(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        node_rank=_integer(environ, "GROUP_RANK", rank // max(1, local_world_size)),
        num_nodes=_integer(environ, "GROUP_WORLD_SIZE", -(-world_size // max(1, local_world_size))),
    )
    shown = [f"{name}={environ[name]}" for name in (*_CORE, "GROUP_RANK", "GROUP_WORLD_SIZE") if name in environ]
    _check(topology, shown)
    return Launch(
        "torchrun",
        topology,
        environ["MASTER_ADDR"],
        _port(environ, "MASTER_PORT"),
        has_agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restarts=_integer(environ, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _read_slurm(environ: Mapping[str, str]) -> Launch:
    needed = ("SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID")
    missing = [name for name in needed if not environ.get(name)]
    if missing:
        raise BackendError(
            f"expected srun to set {', '.join(needed)}, got SLURM_PROCID={environ['SLURM_PROCID']} without "
            f"{', '.join(missing)}; start the tasks with srun, or unset SLURM_PROCID for one process"
        )
    node_rank = _integer(environ, "SLURM_NODEID")
    nodes_name = "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in environ else "SLURM_NNODES"
    topology = Topology(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=_num_tasks(environ),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=_tasks_on_node(environ, node_rank),
        node_rank=node_rank,
        num_nodes=_integer(environ, nodes_name, 1),
    )
    names = (
        *("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID", nodes_name),
        *("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
    )
    _check(topology, [f"{name}={environ[name]}" for name in names if name in environ])
    step = _integer(environ, "SLURM_STEP_ID", 0)
    default_port = 20000 + (_integer(environ, "SLURM_JOB_ID") + 1009 * step) % 12000
    return Launch(
        "slurm",
        topology,
        environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
        _port(environ, "MASTER_PORT", default_port),
        restarts=_integer(environ, "SLURM_RESTART_COUNT", 0),
    )


def _num_tasks(environ: Mapping[str, str]) -> int:
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    return _integer(environ, name, 1)


def _tasks_on_node(environ: Mapping[str, str], node_rank: int) -> int:
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name in environ:
            counts = tasks_per_node(name, environ[name])
            if node_rank >= len(counts):
                raise BackendError(
                    f"expected SLURM_NODEID below the {len(counts)} nodes of {name}={environ[name]}, got {node_rank}; "
                    "start the tasks with srun"
                )
            return counts[node_rank]
    return _integer(environ, "SLURM_NTASKS_PER_NODE", 1)


def tasks_per_node(name: str, text: str) -> list[int]:
    """Expand Slurm's list of tasks by node: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise BackendError(f"expected {name} in a form like 2(x3),1, got {text!r}; start the tasks with srun")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: that of "n[03-05,9],m1" is "n03"."""
    host = ""
    for text, inside in re.findall(r"([^\[\],]+)|\[([^\]]*)\]", re.split(r",(?![^\[]*\])", nodelist)[0]):
        host += text or re.split(r"[-,]", inside)[0]
    if not host:
        raise BackendError(
            f"expected SLURM_STEP_NODELIST in a form like n[03-05,9],m1, got {nodelist!r}; "
            "set MASTER_ADDR to rank 0's host"
        )
    return host


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if not text and default is not None:
        return default
    if text is None or not re.fullmatch(r"[0-9]+", text):
        raise BackendError(f"expected {name} to be a whole number, got {text!r}; let the launcher set it, or unset it")
    return int(text)


def _port(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    port = _integer(environ, name, default)
    if not 0 < port < 2**16:
        raise BackendError(f"expected {name} to be a port from 1 to 65535, got {port}; choose a free one")
    return port


def _check(topology: Topology, shown: list[str]) -> None:
    """Refuse a topology whose numbers contradict each other; the broken rules are the message."""
    rules = {
        "the rank is below the number of ranks": topology.rank < topology.world_size,
        "the local rank is below the number of local ranks": topology.local_rank < topology.local_world_size,
        "a node has no more ranks than there are in all": topology.local_world_size <= topology.world_size,
        "the local rank is not above the rank": topology.local_rank <= topology.rank,
        "the node's rank is below the number of nodes": topology.node_rank < topology.num_nodes,
        "every node has a rank": topology.num_nodes <= topology.world_size,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise BackendError(
            f"expected variables that fit together ({'; '.join(broken)}), got {', '.join(shown)}; "
            "start with torchrun or srun, which set them, or unset them all for one process"
        )
