"""Ranks that torch.distributed connects: gloo on CPUs, and the library of an accelerator's row in `devices.py`.

*Contract*: `process_group` is the default group and runs on `device`. Beside it every backend has a gloo group of its
own, the control group, for headers, numbers, objects and CPU tensors. So an agreement never waits for the queue of an
accelerator, nor behind the traffic of the gradients. Both groups have the timeout `timeout_s`.

*Cost*: one more TCP connection for each pair of ranks, and one sleeping thread (`failure.py`).
"""

import atexit
import ctypes
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from disttrain.backend.checked import CheckedBackend
from disttrain.backend.failure import Board, StoreBoard
from disttrain.backend.rendezvous import Rendezvous, meet
from disttrain.backend.sockets import loopback_name, notice_lost_hosts, open_sockets, shut_down
from disttrain.backend.stores import HashStore, PrefixStore, Store
from disttrain.devices import process_groups
from disttrain.environment import Launch, Topology, set_default
from disttrain.errors import BackendError

logger = logging.getLogger(__name__)

LOOK_UP_EVERY = timedelta(seconds=1)
"""How often a rank that waits for the others checks whether its connections are broken."""


class NativeBackend(CheckedBackend):
    """Ranks that torch.distributed connects; without a launch, a world of one."""

    def __init__(self, launch: Launch | None, device: torch.device, timeout_s: float) -> None:
        if dist.is_initialized():
            raise BackendError(
                "expected no process group in this process, got one that is initialized already; "
                "close the other backend, or call dist.destroy_process_group(), before connect()"
            )
        self.name = process_groups()[device.type]
        self.device = device
        self.topology = launch.topology if launch is not None else Topology()
        self.restarts = launch.restarts if launch is not None else 0
        self._timeout = timedelta(seconds=timeout_s)
        self._sockets: dict[int, str] = {}
        self._broken = False
        self._stuck = False
        self._board = Board(self.rank)
        before = open_sockets()
        rendezvous = meet(launch, timeout_s) if launch is not None and self.world_size > 1 else None
        try:
            self._open_groups(rendezvous)
            self._board = self._open_board(rendezvous)
            self._check_devices()
            self.barrier()  # after it all ranks have opened their connections to rank 0's store
            notice_lost_hosts({fd: inode for fd, inode in open_sockets().items() if before.get(fd) != inode})
        except BaseException:
            self._board.close()
            if dist.is_initialized():
                dist.destroy_process_group()
            raise
        self._owner = os.getpid()
        atexit.register(self._close_at_exit)

    def _open_groups(self, rendezvous: Rendezvous | None) -> None:
        """Open both groups, and record the sockets of their connections.

        Every new socket of this process belongs to a group, except rank 0's answers at the port of the store.
        """
        store: Store = rendezvous.store if rendezvous is not None else HashStore()
        port = rendezvous.port if rendezvous is not None else None
        if self.topology.local_world_size == self.world_size and (loopback := loopback_name()) is not None:
            # gloo would wait for minutes on a host whose name resolves to an address that the host does not have.
            set_default("GLOO_SOCKET_IFNAME", loopback)
        bound = self.device if self.device.type != "cpu" else None
        if bound is not None and bound.index is not None:
            torch.accelerator.set_device_index(bound.index)
        before = open_sockets()
        dist.init_process_group(
            self.name,
            store=PrefixStore("disttrain/groups", store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=self._timeout,
            device_id=bound,
        )
        if bound is not None:
            before = open_sockets()
        self._control = dist.new_group(backend="gloo", timeout=self._timeout)
        self._sockets = {fd: inode for fd, inode in open_sockets(port).items() if before.get(fd) != inode}
        self._group = dist.group.WORLD

    def _open_board(self, rendezvous: Rendezvous | None) -> Board:
        if rendezvous is None:
            return Board()
        return StoreBoard(self.rank, self.world_size, rendezvous.connect, self._break)

    def _check_devices(self) -> None:
        """Refuse two ranks on one accelerator; its library would refuse them later and less clearly."""
        if self.device.type == "cpu":
            return
        properties = torch.get_device_module(self.device).get_device_properties(self.device)
        own_name = str(getattr(properties, "uuid", f"node {self.node_rank}, {self.device}"))
        ranks_by_device: dict[str, list[int]] = {}
        for rank, name in enumerate(self.all_gather(own_name)):
            ranks_by_device.setdefault(name, []).append(rank)
        for name, ranks in ranks_by_device.items():
            if len(ranks) > 1:
                raise BackendError(
                    f"expected an accelerator of its own for every rank, got ranks {', '.join(map(str, ranks))} on "
                    f"{self.device.type} {name}; start one rank per accelerator, or use backend='gloo'"
                )

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        if self._closed:
            raise BackendError("expected an open backend for process_group, got a closed one; call connect() again")
        return self._group

    def flight_record(self) -> bytes | None:
        library: Any = torch._C._distributed_c10d
        own = getattr(library, f"_dump_{self.name}_trace_json", None)  # nccl has a recorder of its own
        dump = own or getattr(library, "_dump_fr_trace_json", None)  # neither is in every torch
        return None if dump is None else bytes(dump(includeCollectives=True, onlyActive=False))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._close_at_exit)
        self._board.close()
        if self._stuck:
            # To free a group waits for its threads, and one of them waits for the timeout. So the group is never freed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._control))
        try:
            if dist.is_initialized():
                dist.destroy_process_group()
        except RuntimeError as error:
            if not self._broken:
                raise
            logger.debug("a broken process group could not be destroyed: %s", error)

    def _close_at_exit(self) -> None:
        """Stop the listener before the interpreter ends; not in a forked child, which shares the listener's socket."""
        if os.getpid() == self._owner:
            self.close()

    def _break(self) -> None:
        """Make every running collective of this rank raise. The listener's thread calls it too."""
        if self._broken or self._closed:
            return
        self._broken = True
        shut_down(self._sockets)
        if self.device.type != "cpu" and self._group is not None:
            self._group.abort()

    def _start_gather(self, data: Tensor) -> Callable[[], Tensor]:
        group, sent = self._route(data)
        rows = sent.new_empty(self.world_size, sent.numel())
        work = dist.all_gather(list(rows.unbind()), sent, group=group, async_op=True)

        def collect() -> Tensor:
            self._finish(work, group)
            return rows.to(data.device)

        return collect

    def _finish(self, work: dist.Work | None, group: dist.ProcessGroup | None) -> None:
        """Wait for a collective; RuntimeError if it fails, or if it was running when the connections broke.

        gloo may not report a broken connection: it forgets a send that its loop begins as the connection breaks, and
        the wait for that send lasts for the whole timeout. This happens in about one failure of twenty (three ranks,
        torch 2.13).
        """
        while work is not None:
            try:
                # On an accelerator a wait with a limit would block the host; without one only the stream waits.
                work.wait(LOOK_UP_EVERY) if group is self._control else work.wait()
                return
            except RuntimeError:
                if work.is_completed():  # by an error, or just after the limit of this wait
                    work.wait()
                    return
                if self._broken:
                    self._stuck = True
                    raise

    def _spread(self, data: Tensor, source: int) -> None:
        group, sent = self._route(data)
        self._finish(dist.broadcast(sent, src=source, group=group, async_op=True), group)
        if sent is not data:
            data.copy_(sent)

    def _route(self, data: Tensor) -> tuple[dist.ProcessGroup | None, Tensor]:
        """Return the group that moves `data`, and `data` on the device of that group."""
        if data.device.type == self.device.type and self.device.type != "cpu":
            return self._group, data
        return self._control, data.cpu()


def choose_device(device_type: str, num_devices: int, topology: Topology) -> torch.device:
    """Return the device of one rank: the device of its local rank, or the only visible device."""
    if device_type == "cpu":
        return torch.device("cpu")
    if num_devices >= topology.local_world_size:
        return torch.device(device_type, topology.local_rank)
    if num_devices == 1:
        return torch.device(device_type, 0)  # its own (--gpus-per-task) or a shared one; _check_devices finds out
    raise BackendError(
        f"expected at most {num_devices} ranks on this host, one for each {device_type} device, got "
        f"{topology.local_world_size}; start fewer ranks, or use backend='gloo'"
    )
