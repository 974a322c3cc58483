"""The key-value stores of torch.distributed, typed, and the two ways to get one.

*Errors*: RuntimeError, torch's own, for a port that is in use and for a store that does not answer.
"""

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
else:
    from torch.distributed import HashStore, PrefixStore, Store, TCPStore

__all__ = ["HashStore", "PrefixStore", "Store", "TCPStore", "connect_store", "open_store"]


def open_store(port: int, timeout_s: float) -> TCPStore:
    """Open a store in this process at `port`, or at a free port for 0; it lives as long as the object."""
    return TCPStore("localhost", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def connect_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """Connect to a store that a process has opened; RuntimeError if it does not answer within `timeout_s`."""
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
