"""The contract of every backend: `single`, `gloo`, `nccl`, `xla` and threads.

*Contract*: code that needs a rank or a collective gets a `Backend` as an argument; there is no global one. One rank
has the same checks, shapes and errors as many ranks. Every rank calls the same collectives in the same order, from one
thread at a time. A collective never changes its input; its result is a new object on the input's device.

*Errors*: if the ranks' calls differ (another operation, dtype, shape, op, source), every rank raises a `BackendError`
that names the call of each rank; no rank hangs or aborts. An argument that is wrong on all ranks is a `ValueError` or
`TypeError` on all ranks. A rank that stops for another rank's error raises `RemoteError`. A peer that dies, or is
absent for longer than `timeout_s`, is a `BackendError`.

*Cost*: these collectives are for control and metrics, not for the hot path. Each begins with one gather of a 1 KiB
header over the CPUs' network, which takes under a millisecond between processes of one host. Numbers, small objects
and barriers need no more than this gather. Gradients use `process_group`.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn

from disttrain.environment import Topology
from disttrain.errors import RemoteError
from disttrain.seeding import seed_position

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
ModuleT = TypeVar("ModuleT", bound=nn.Module)

Op = Literal["sum", "mean", "min", "max", "product"]


@dataclass
class Contact:
    """One call of this rank that waits for the others: its `number` since the connection, and its `text`."""

    number: int
    text: str
    began: float
    """The time of `time.monotonic()`; `ended` has the same clock, and is None while the call is under way."""
    ended: float | None = None

    def words(self, now: float) -> str:
        """Return the call and its state in words."""
        seconds = now - (self.began if self.ended is None else self.ended)
        state = f"under way for {seconds:.0f} s" if self.ended is None else f"ended {seconds:.0f} s ago"
        return f"{self.text} (call {self.number}), {state}"


@dataclass(frozen=True)
class Programs:
    """The programs that a device's compiler has compiled in this process."""

    num_compiled: int
    fallback_ops: tuple[str, ...]
    """Operations that the compiler does not know; the CPU ran them, with a copy to the host and back."""


class Backend(ABC):
    """Rank, sizes, device and collectives of one process of a run.

    A context manager: a normal exit closes it. An exit by an exception first reports the exception to the other ranks
    (`fail`), so they stop with its message instead of waiting.
    """

    name: str
    device: torch.device
    topology: Topology
    restarts: int
    """The number of times that the launcher has restarted this process's group within this launch."""
    last_contact: Contact | None = None
    """The newest call of this rank that waits for the others; calls of `process_group` do not count."""
    num_devices: int = 1
    """The devices over which this rank spreads its tensors: several in XLA's SPMD mode, where `device` means all."""

    @property
    def rank(self) -> int:
        return self.topology.rank

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @property
    def local_rank(self) -> int:
        return self.topology.local_rank

    @property
    def local_world_size(self) -> int:
        return self.topology.local_world_size

    @property
    def node_rank(self) -> int:
        return self.topology.node_rank

    @property
    def num_nodes(self) -> int:
        return self.topology.num_nodes

    @property
    @abstractmethod
    def process_group(self) -> "ProcessGroup | None":
        """The process group for gradients and shards, on `device`; None on `single` and `xla`, which need none."""

    @abstractmethod
    def all_reduce(self, value: T, op: Op = "sum") -> T:
        """Reduce a tensor or a number over all ranks, folding in rank order: the same bits on every rank.

        Tensors keep their shape, dtype and device; a bool, an int and a float keep their type. The mean of integers is
        a float. A bool takes min (all) and max (any) only. Python's integers do not overflow; tensors' integers do.

        *Cost*: for a tensor of n bytes each rank receives world_size * n bytes, in pieces of bounded memory.
        """

    @abstractmethod
    def all_gather(self, value: Any) -> Any:
        """Gather: a tensor of shape S gives one of [world_size, *S]; anything else a list by rank.

        Tensors must agree in dtype and shape. Other values may differ and must be picklable.
        """

    @abstractmethod
    def broadcast(self, value: T | None, source: int = 0) -> T:
        """Return rank `source`'s tensor, number, string or plain object on every rank.

        The values of the other ranks are ignored and may be None. The result is on the CPU if the source's tensor is
        there, and on `device` otherwise.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every rank calls this. Work that is queued on an accelerator may still run."""

    @abstractmethod
    def start_any(self, flag: bool) -> Callable[[], bool]:
        """Start a reduction of `flag` by "or" over all ranks; the returned function waits for the result.

        The exchange runs while the caller continues: start it at the end of one step and collect it at the end of the
        next. A second call of the function returns the same result.
        """

    @abstractmethod
    def agree(self, what: str) -> AbstractContextManager[None]:
        """Run the body on every rank; if it raises on any rank, raise on all.

        A rank whose body raised gets its own error. The others get the RemoteError of the lowest such rank. `what`
        names the body ("building the model") and must be the same on all ranks.
        """

    @abstractmethod
    def one_rank_first(self, *, local: bool = False) -> AbstractContextManager[None]:
        """Run the body on rank 0 first (or on each node's local rank 0), then on the others; for downloads.

        If the body raises on the first rank, the others raise RemoteError and do not run it. The body must call no
        collectives and end within `timeout_s`.
        """

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Report to all ranks that this one failed; a rank that is blocked in a collective wakes with an error.

        The first failure of the run wins. Returns when the others have received it, and after 5 s at the latest. Never
        raises. Afterwards no collective works on any rank.
        """

    @abstractmethod
    def first_failure(self, wait_s: float = 2.0) -> RemoteError | None:
        """Return the first failure that any rank reported by `fail`, after a wait of at most `wait_s`.

        Call it when a collective of `process_group` has failed. None: no rank reported a failure; a rank was killed.
        """

    def flight_record(self) -> bytes | None:
        """Return torch's record of the newest collectives of all process groups, as JSON; None without a record."""
        return None

    def hurry(self) -> None:
        """Stop waiting for other ranks' failures, because the launcher is ending the ranks.

        Any thread may call it. `fail` and `first_failure` then return at once.
        """
        return

    @abstractmethod
    def close(self) -> None:
        """Leave the group. Every later collective raises BackendError; a second close does nothing."""

    @property
    def metrics_device(self) -> torch.device:
        """The device that computes validation metrics: `device`, or the CPU if `device` compiles every new shape."""
        return self.device

    def move(self, module: ModuleT) -> ModuleT:
        """Return the module on `device`; tied parameters stay tied."""
        return module.to(self.device)

    def compile(self, module: nn.Module) -> None:
        """Compile the module in place by `torch.compile`; ConfigError if the device cannot."""
        module.compile()

    def seed(self, seed: int) -> None:
        """Seed python's, numpy's and torch's generators, those of `device` too, for one position of a run."""
        seed_position(seed)

    def fetch(self, values: Sequence[Tensor]) -> list[float]:
        """Return 0-dimensional tensors on `device` as numbers, by one copy to the host."""
        return torch.stack(list(values)).cpu().double().tolist() if values else []

    def gather_recorded(self, tensor: Tensor) -> Tensor:
        """Gather a tensor on `device` as `all_gather` does; XLA only records it until `flush`, and checks nothing."""
        gathered: Tensor = self.all_gather(tensor)
        return gathered

    def flush(self) -> None:
        """Send the recorded operations to the device; does nothing on a device that runs them at once."""
        return

    def programs(self) -> Programs | None:
        """Return the programs that were compiled so far; None on a device that does not compile whole steps."""
        return None

    def rank_zero_only(self, func: Callable[P, R]) -> Callable[P, R | None]:
        """Decorate `func` to run on rank 0 only; it returns None on the others."""

        @functools.wraps(func)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | None:
            return func(*args, **kwargs) if self.rank == 0 else None

        return wrapper

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        clean_exit = isinstance(error, SystemExit) and not error.code
        if error is not None and not clean_exit:
            self.fail(error)
        self.close()
