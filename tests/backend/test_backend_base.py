"""The parts of the contract that need no other rank: sizes, contacts, the context manager, and the defaults."""

import pytest
import torch
from torch import nn

from disttrain.backend.base import Backend, Contact
from disttrain.backend.single import SingleBackend
from disttrain.environment import Topology


class Recorded(SingleBackend):
    """A backend of one process that records how it ends."""

    def __init__(self, topology: Topology) -> None:
        super().__init__(torch.device("cpu"))
        self.topology = topology
        self.ends: list[str] = []

    def fail(self, error: BaseException) -> None:
        self.ends.append(repr(error))
        super().fail(error)

    def close(self) -> None:
        self.ends.append("closed")
        super().close()


def test_a_backend_has_the_numbers_of_its_topology() -> None:
    backend = Recorded(Topology(rank=5, world_size=8, local_rank=1, local_world_size=4, node_rank=1, num_nodes=2))
    numbers = backend.rank, backend.world_size, backend.local_rank, backend.local_world_size
    assert (*numbers, backend.node_rank, backend.num_nodes) == (5, 8, 1, 4, 1, 2)


def test_a_backend_without_collectives_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Backend()  # type: ignore[abstract]


def test_a_normal_exit_closes_and_an_error_is_reported_first() -> None:
    cases: list[tuple[BaseException | None, list[str]]] = [
        (None, ["closed"]),
        (ValueError("no"), ["ValueError('no')", "closed"]),
        (KeyboardInterrupt(), ["KeyboardInterrupt()", "closed"]),
        (SystemExit(3), ["SystemExit(3)", "closed"]),
        (SystemExit(0), ["closed"]),
        (SystemExit(), ["closed"]),
    ]
    for error, ends in cases:
        backend = Recorded(Topology())
        if error is None:
            with backend as entered:
                assert entered is backend
        else:
            with pytest.raises(type(error)), backend:
                raise error
        assert backend.ends == ends


@pytest.mark.parametrize(("rank", "result"), [(0, 42), (1, None)])
def test_a_decorated_function_runs_on_rank_0_only(rank: int, result: int | None) -> None:
    calls = []

    @Recorded(Topology(rank, 2, rank, 2)).rank_zero_only
    def add(x: int, *, y: int) -> int:
        """Add."""
        calls.append(x)
        return x + y

    assert add(40, y=2) == result
    assert len(calls) == (rank == 0)
    assert (add.__name__, add.__doc__) == ("add", "Add.")


def test_a_contact_in_words() -> None:
    contact = Contact(7, "barrier()", began=100.0)
    assert contact.words(now=112.4) == "barrier() (call 7), under way for 12 s"
    contact.ended = 113.0
    assert contact.words(now=120.0) == "barrier() (call 7), ended 7 s ago"


def test_scalars_are_fetched_as_numbers() -> None:
    backend = Recorded(Topology())
    assert backend.fetch([]) == []
    assert backend.fetch([torch.tensor(1.5), torch.tensor(-0.25)]) == [1.5, -0.25]


def test_a_moved_module_keeps_its_ties() -> None:
    module = nn.Module()
    module.table = nn.Embedding(5, 4)
    module.head = nn.Linear(4, 5, bias=False)
    module.head.weight = module.table.weight
    moved = Recorded(Topology()).move(module)
    assert moved.head.weight is moved.table.weight


def test_a_device_that_runs_operations_at_once_has_nothing_to_flush() -> None:
    backend = Recorded(Topology())
    backend.flush()
    assert (backend.programs(), backend.flight_record(), backend.num_devices) == (None, None, 1)
    assert backend.metrics_device == backend.device
    assert torch.equal(backend.gather_recorded(torch.ones(2)), torch.ones(1, 2))
