"""Where a run happens: the contract that `single`, `gloo`, `nccl` and `xla` obey alike.

*Contract*: a `Backend` is passed to whoever needs a rank or a collective; there is no ambient one. One rank
obeys the same checks, shapes and errors as many. Every rank calls the same collectives in the same order,
from one thread at a time. Inputs are never changed; results are new and live on the input's device.

*Errors*: where the ranks' calls differ (another operation, dtype, shape, op, source), every rank gets a
`BackendError` that names what each rank called; none hangs and none aborts. An argument that is wrong on
all ranks alike is a `ValueError` or `TypeError` on all. A rank that stops for another rank's error raises
`RemoteError`. A peer that dies or stays away longer than `timeout_s` is a `BackendError`.

*Cost*: these collectives are for control and metrics, not for the hot path. Each begins with one gather of
a 1 KiB header over the CPU's network (under a millisecond between processes of one host), which is all that
numbers, small objects and barriers need. Gradients use `process_group`.
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

from disttrain.errors import RemoteError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
ModuleT = TypeVar("ModuleT", bound=nn.Module)

Op = Literal["sum", "mean", "min", "max", "product"]


@dataclass(frozen=True)
class Place:
    """Where this process stands among the others; the defaults are one process alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1


@dataclass
class Contact:
    """One call of this rank's to the others: the `number`-th since it connected, as `text` tells it."""

    number: int
    text: str
    began: float
    """By `time.monotonic()`; so is `ended`, None while it is under way."""
    ended: float | None = None

    def words(self, now: float) -> str:
        """Return it as a person reads it."""
        since = now - (self.began if self.ended is None else self.ended)
        how = f"under way for {since:.0f} s" if self.ended is None else f"ended {since:.0f} s ago"
        return f"{self.text} (call {self.number}), {how}"


@dataclass(frozen=True)
class Programs:
    """What a device's compiler did in this process so far."""

    num_compiled: int
    fallback_ops: tuple[str, ...]
    """Operations that it does not know and the CPU ran in its stead, with a copy there and back."""


class Backend(ABC):
    """Rank, sizes, device and collectives of one process of a run.

    A context manager: leaving it normally closes it; leaving it by an exception first tells the other ranks
    (`fail`), so that they stop with that message instead of waiting.
    """

    name: str
    device: torch.device
    place: Place
    restarts: int
    """How often the launcher has restarted this process's group within this launch."""
    last_contact: Contact | None = None
    """The newest of this rank's calls to the others; those of `process_group` are not among them."""
    num_devices: int = 1
    """Devices over which this rank spreads its tensors: several in XLA's SPMD mode, where `device` stands for all."""

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world_size(self) -> int:
        return self.place.world_size

    @property
    def local_rank(self) -> int:
        return self.place.local_rank

    @property
    def local_world_size(self) -> int:
        return self.place.local_world_size

    @property
    def node_rank(self) -> int:
        return self.place.node_rank

    @property
    def num_nodes(self) -> int:
        return self.place.num_nodes

    @property
    @abstractmethod
    def process_group(self) -> "ProcessGroup | None":
        """The process group for gradients and shards, on `device`; None on `single` and on `xla`, which needs none."""

    @abstractmethod
    def all_reduce(self, value: T, op: Op = "sum") -> T:
        """Reduce a tensor or a number over all ranks, folding in rank order: the same bits on every rank.

        Tensors keep shape, dtype and device; bool, int and float stay what they are. The mean of integers is
        a float. bool takes min (all) and max (any) alone. Python's integers do not overflow; tensors' do.
        Cost for a tensor of n bytes: world_size * n received, in pieces of bounded memory.
        """

    @abstractmethod
    def all_gather(self, value: Any) -> Any:
        """Gather: a tensor of shape S gives one of [world_size, *S]; anything else a list by rank.

        Tensors must agree in dtype and shape. Other values may differ and must be picklable.
        """

    @abstractmethod
    def broadcast(self, value: T | None, source: int = 0) -> T:
        """Return rank `source`'s tensor, number, string or plain object on every rank.

        What the other ranks pass is ignored; None will do. A tensor arrives on the CPU if it lay there and
        on `device` otherwise.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every rank is here. Work queued on an accelerator is not waited for."""

    @abstractmethod
    def start_any(self, flag: bool) -> Callable[[], bool]:
        """Start to ask whether any rank says True; the function returned waits for the answer.

        The ranks talk while the caller goes on: start it at the end of a step, collect it at the next one's.
        Collecting twice gives the same answer.
        """

    @abstractmethod
    def agree(self, what: str) -> AbstractContextManager[None]:
        """Run the body on every rank; if it raises on any, it raises on all.

        A rank whose body raised gets its own error, the others the RemoteError of the lowest such rank.
        `what` names the body ("building the model") and must be the same on all ranks.
        """

    @abstractmethod
    def one_rank_first(self, *, local: bool = False) -> AbstractContextManager[None]:
        """Let rank 0 (or each node's local rank 0) through the body first, then the others; for downloads.

        If the body raises there, the others raise RemoteError instead of running it. The body calls no
        collectives and ends within `timeout_s`.
        """

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Tell all ranks that this one failed, wherever they are; those blocked in a collective wake with an error.

        The first failure of the run wins. Returns when the others have heard, after 5 s at the latest.
        Never raises; afterwards no collective works on any rank.
        """

    @abstractmethod
    def first_failure(self, wait_s: float = 2.0) -> RemoteError | None:
        """Return the first failure that any rank reported by `fail`, waiting for one up to `wait_s`.

        What to ask when a collective of `process_group` broke. None: no rank reported one; it was killed.
        """

    def flight_record(self) -> bytes | None:
        """Return what torch remembers of the newest collectives of all process groups, as JSON; None where nothing."""
        return None

    def hurry(self) -> None:
        """Wait no longer for what other ranks have to say about a failure: the launcher is ending them.

        Called by any thread; `fail` and whoever asks for the first failure then return at once.
        """
        return

    @abstractmethod
    def close(self) -> None:
        """Leave the group; any number of times. Every later collective raises BackendError."""

    @property
    def metrics_device(self) -> torch.device:
        """Where validation metrics are computed: on `device`, except where it compiles every shape anew."""
        return self.device

    def move(self, module: ModuleT) -> ModuleT:
        """Return the module on `device`; parameters that are tied stay so."""
        return module.to(self.device)

    def compile(self, module: nn.Module) -> None:
        """Let `torch.compile` compile the module in place; ConfigError where the device cannot."""
        module.compile()

    def fetch(self, values: Sequence[Tensor]) -> list[float]:
        """Return 0-dimensional tensors on `device` as numbers, brought to the host together."""
        return torch.stack(list(values)).cpu().double().tolist() if values else []

    def gather_recorded(self, tensor: Tensor) -> Tensor:
        """Gather a tensor on `device` as `all_gather` does; XLA checks nothing and sends nothing before `flush`."""
        gathered: Tensor = self.all_gather(tensor)
        return gathered

    def flush(self) -> None:
        """Send to the device what was recorded for it; nothing where operations are sent as they are called."""
        return

    def programs(self) -> Programs | None:
        """Return what the device's compiler did so far; None where there is none that compiles whole steps."""
        return None

    def rank_zero_only(self, func: Callable[P, R]) -> Callable[P, R | None]:
        """Decorate `func` to run on rank 0 alone; the others get None."""

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
