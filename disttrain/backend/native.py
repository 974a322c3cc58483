"""Ranks that torch.distributed connects: gloo on CPUs, and an accelerator's own library where there is one.

*Contract*: `process_group` is the default group and runs on `device`. Beside it every backend keeps a gloo group
of its own for headers, numbers, objects and CPU tensors, so that agreeing on something never waits for an
accelerator's queue, and never meets the gradients' traffic. Both have the timeout `timeout_s`.

*Cost*: one more TCP connection for each pair of ranks, and one sleeping thread (failure.py).
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

from disttrain.backend.base import Place
from disttrain.backend.checked import CheckedBackend
from disttrain.backend.environment import Launch, set_default
from disttrain.backend.failure import Board, StoreBoard
from disttrain.backend.rendezvous import Meeting, meet
from disttrain.backend.sockets import loopback_name, notice_lost_hosts, open_sockets, shut_down
from disttrain.backend.stores import HashStore, PrefixStore, Store
from disttrain.errors import BackendError

logger = logging.getLogger(__name__)

GROUPS = {"cpu": "gloo", "cuda": "nccl"}
"""Device type to the library that connects it. Another accelerator of torch.accelerator is another row."""

LOOK_UP_EVERY = timedelta(seconds=1)
"""How often a rank that waits for the others looks whether its connections are broken."""


class NativeBackend(CheckedBackend):
    """Ranks connected by torch.distributed; without a launch, a world of one."""

    def __init__(self, launch: Launch | None, device: torch.device, timeout_s: float) -> None:
        if dist.is_initialized():
            raise BackendError(
                "expected no process group in this process, got one that is initialized already; "
                "close the other backend, or call dist.destroy_process_group(), before connect()"
            )
        self.name = GROUPS[device.type]
        self.device = device
        self.place = launch.place if launch is not None else Place()
        self.restarts = launch.restarts if launch is not None else 0
        self._timeout = timedelta(seconds=timeout_s)
        self._sockets: dict[int, str] = {}
        self._broken = False
        self._stuck = False
        self._board = Board(self.rank)
        before = open_sockets()
        meeting = meet(launch, timeout_s) if launch is not None and self.world_size > 1 else None
        try:
            self._open_groups(meeting)
            self._board = self._open_board(meeting)
            self._check_devices()
            self.barrier()  # which none passes before all have opened their connections to rank 0's store
            notice_lost_hosts({fd: inode for fd, inode in open_sockets().items() if before.get(fd) != inode})
        except BaseException:
            self._board.close()
            if dist.is_initialized():
                dist.destroy_process_group()
            raise
        self._owner = os.getpid()
        atexit.register(self._close_at_exit)

    def _open_groups(self, meeting: Meeting | None) -> None:
        """Open both groups, and note which connections are theirs.

        What is new among this process's sockets is theirs, except that rank 0 answers at the store's port meanwhile.
        """
        store: Store = meeting.store if meeting is not None else HashStore()
        port = meeting.port if meeting is not None else None
        if self.place.local_world_size == self.world_size and (loopback := loopback_name()) is not None:
            # A host whose name resolves to an address that it does not have would stall gloo for minutes.
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

    def _open_board(self, meeting: Meeting | None) -> Board:
        if meeting is None:
            return Board()
        return StoreBoard(self.rank, self.world_size, meeting.connect, self._break)

    def _check_devices(self) -> None:
        """Refuse two ranks on one accelerator, which its library would refuse later and less clearly."""
        if self.device.type == "cpu":
            return
        properties = torch.get_device_module(self.device).get_device_properties(self.device)
        mine = str(getattr(properties, "uuid", f"node {self.node_rank}, {self.device}"))
        ranks_by_device: dict[str, list[int]] = {}
        for rank, name in enumerate(self.all_gather(mine)):
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
            raise BackendError("process_group was asked of a backend that is closed; call connect() again")
        return self._group

    def flight_record(self) -> bytes | None:
        library: Any = torch._C._distributed_c10d
        name = "_dump_nccl_trace_json" if self.name == "nccl" else "_dump_fr_trace_json"
        dump = getattr(library, name, None)  # neither is in every torch
        return None if dump is None else bytes(dump(includeCollectives=True, onlyActive=False))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._close_at_exit)
        self._board.close()
        if self._stuck:
            # Freeing a group waits for its threads, and one of them waits for its timeout: it is never freed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._control))
        try:
            if dist.is_initialized():
                dist.destroy_process_group()
        except RuntimeError as error:
            if not self._broken:
                raise
            logger.debug("a broken process group could not be destroyed: %s", error)

    def _close_at_exit(self) -> None:
        """Stop the listener before the interpreter goes; not in a child that was forked, which shares its socket."""
        if os.getpid() == self._owner:
            self.close()

    def _break(self) -> None:
        """Make every collective under way on this rank raise. Called by the listener's thread too."""
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
        """Wait for a collective; RuntimeError where it fails, or where it was under way when the connections broke.

        Then gloo may never say so: a send that its loop takes up as the connection breaks is forgotten, and who waits
        for it waits for the whole timeout (in about one failure of twenty, three ranks, torch 2.13).
        """
        while work is not None:
            try:
                # A wait with a limit blocks the host where the accelerator's library needs no more than its stream.
                work.wait(LOOK_UP_EVERY) if group is self._control else work.wait()
                return
            except RuntimeError:
                if work.is_completed():  # by an error, or while this wait gave up
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
        """Return the group that moves `data`, and `data` where that group wants it."""
        if data.device.type == self.device.type and self.device.type != "cpu":
            return self._group, data
        return self._control, data.cpu()


def choose_device(device_type: str, num_devices: int, place: Place) -> torch.device:
    """Return the device of one rank: its local rank's, or the only one that the launcher lets it see."""
    if device_type == "cpu":
        return torch.device("cpu")
    if num_devices >= place.local_world_size:
        return torch.device(device_type, place.local_rank)
    if num_devices == 1:
        return torch.device(device_type, 0)  # its own by --gpus-per-task, or shared: connecting finds out
    raise BackendError(
        f"expected at most {num_devices} ranks on this host, one for each {device_type} device, got "
        f"{place.local_world_size}; start fewer, or use backend='gloo'"
    )
