"""WHERE a run happens: ranks, devices, and the collectives by which ranks agree.

`connect()` returns the `Backend` of this process. Code that needs a rank or a collective takes it as an argument.
`disttrain/environment.py` reads the variables of the launch, and `disttrain/devices.py` has a row for each device type.

    base         the contract of a backend: rank, sizes, device, collectives
    connect      chooses the backend of this process and connects it
    checked      the collectives of every backend; they compare the ranks' calls before they move data
    headers      the header that each rank sends at the start of a collective
    reduce_ops   the arithmetic of all_reduce
    single       the backend of one process without a launcher
    native       gloo, nccl and the like, by torch.distributed
    threads      ranks that are threads of one process
    xla          ranks that are XLA devices
    xla_spmd     one rank that drives all XLA devices of a host
    rendezvous   brings the ranks of one attempt together at a new store
    ended_before notes for ranks that are started again that a mistake ended their launch
    stores       the key-value stores of torch.distributed
    failure      the board on which a rank posts the first failure of the run
    sockets      the connections of a process group, which a failure breaks
    determinism  the settings of the process that decide the bits of a result

| noun     | meaning                                                                                |
|----------|----------------------------------------------------------------------------------------|
| topology | the rank of a process, its local rank and its node's rank, and the sizes of each       |
| attempt  | the life of a group of ranks, from their rendezvous to a restart by the launcher       |
| header   | 1 KiB in which a rank describes its call of a collective                               |
| shared   | an error that every rank has already received, so no rank sends it again               |
| board    | the object of a rank that posts the first failure and receives the others' failures    |
| bell     | the key of the store at which the listener of one rank waits for a failure             |
| contact  | the newest call by which a rank waits for the others; the watchdog shows it            |
| control  | the group on the CPUs that moves headers, numbers and objects, beside an accelerator's |
"""

from disttrain.backend.base import Backend, Op
from disttrain.backend.connect import connect
from disttrain.backend.determinism import (
    kernels_of,
    make_deterministic,
    refused_operations_named,
    set_cpu_threads,
    set_tf32,
)
from disttrain.environment import Topology

__all__ = [
    "Backend",
    "Op",
    "Topology",
    "connect",
    "kernels_of",
    "make_deterministic",
    "refused_operations_named",
    "set_cpu_threads",
    "set_tf32",
]
