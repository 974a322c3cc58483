"""The variables by which an agent that recovers in place tells its ranks where they agree, and who they are."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import WorkerGroup


@dataclass(frozen=True)
class Recovery:
    """Where the ranks of a launch that recovers in place agree, and this process's name among them.

    The agent's store at `host:port` holds it under `prefix`. A member or host without a sign of life for `silence_s` is
    left out.
    """

    host: str
    port: int
    prefix: str
    member: str
    silence_s: float

    def variables(self) -> dict[str, str]:
        """Return the variables that tell a rank of this; `read_recovery` reads them."""
        return {
            "DISTTRAIN_RECOVERY_STORE": f"{self.host}:{self.port}",
            "DISTTRAIN_RECOVERY_PREFIX": self.prefix,
            "DISTTRAIN_RECOVERY_MEMBER": self.member,
            "DISTTRAIN_RECOVERY_SILENCE_S": str(self.silence_s),
        }


def read_recovery(environ: Mapping[str, str] = os.environ) -> Recovery | None:
    """Return the place that the variables of a launch that recovers in place name; None without them."""
    if "DISTTRAIN_RECOVERY_STORE" not in environ:
        return None
    host, _, port = environ["DISTTRAIN_RECOVERY_STORE"].rpartition(":")
    member, prefix = environ["DISTTRAIN_RECOVERY_MEMBER"], environ["DISTTRAIN_RECOVERY_PREFIX"]
    return Recovery(host, int(port), prefix, member, float(environ["DISTTRAIN_RECOVERY_SILENCE_S"]))


def torchruns_variables(worker_group: "WorkerGroup", local_rank: int, restarts: int) -> Mapping[str, str]:
    """Return the variables that torchrun gives a rank; its numbers are those of the beginning."""
    spec, worker = worker_group.spec, worker_group.workers[local_rank]
    return {
        "RANK": str(worker.global_rank),
        "LOCAL_RANK": str(local_rank),
        "GROUP_RANK": str(worker_group.group_rank),
        "ROLE_RANK": str(worker.role_rank),
        "ROLE_NAME": spec.role,
        "WORLD_SIZE": str(worker.world_size),
        "LOCAL_WORLD_SIZE": str(spec.local_world_size),
        "GROUP_WORLD_SIZE": str(worker_group.group_world_size),
        "ROLE_WORLD_SIZE": str(worker.role_world_size),
        "MASTER_ADDR": str(worker_group.master_addr),
        "MASTER_PORT": str(worker_group.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(restarts),
        "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
        "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
        "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }
