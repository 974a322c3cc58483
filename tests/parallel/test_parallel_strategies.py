"""The layout and the gradients of each strategy, by the number of ranks and the device."""

from typing import Any

import pytest
import torch
from ranks import Ranks
from slot_models import NEEDS_FSDP
from torch import nn

from disttrain.backend.base import Backend
from disttrain.errors import ConfigError
from disttrain.parallel import Slots, World, strategy_for

CPU = torch.device("cpu")


def names(backend: Backend, strategy: Any) -> tuple[str, str]:
    model = nn.Sequential(nn.Linear(2, 2))
    slots = Slots(2, backend.rank, backend.world_size)
    chosen = strategy_for(strategy, model, World(slots=slots, device=CPU, process_group=backend.process_group))
    gradients = chosen.gradients(model, seed=0)
    classes = type(chosen.layout).__name__, type(gradients).__name__
    gradients.close()
    assert isinstance(gradients.module, nn.Identity)
    return classes


@pytest.mark.parametrize(
    ("world_size", "strategy", "expected"),
    [
        (1, "ddp", ("ReplicatedLayout", "SlotGradients")),
        (2, "ddp", ("ReplicatedLayout", "SlotGradients")),
        (1, "fsdp", ("UncutLayout", "SlotGradients")),
        pytest.param(2, "fsdp", ("FsdpLayout", "FsdpGradients"), marks=NEEDS_FSDP),
    ],
)
def test_a_strategy_makes_its_layout_and_its_gradients(
    ranks: Ranks, world_size: int, strategy: str, expected: tuple[str, str]
) -> None:
    assert ranks(world_size, names, strategy) == [expected] * world_size


SPREAD = [
    pytest.param(strategy, gather, marks=NEEDS_FSDP if strategy == "fsdp" else ())
    for strategy, gather in (("ddp", "step"), ("fsdp", "step"), ("fsdp", "module"))
]


def world_of(backend: Backend, gather: Any) -> World:
    slots = Slots(backend.world_size, backend.rank, backend.world_size)
    return World(slots=slots, device=CPU, process_group=backend.process_group, fsdp_gather=gather)


def weights_of_a_model_that_differs(backend: Backend, strategy: Any, gather: Any) -> list[list[float]]:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    for tensor in model.state_dict().values():
        tensor.fill_(backend.rank + 1)
    chosen = strategy_for(strategy, model, world_of(backend, gather))
    gradients = chosen.gradients(model, seed=0)
    whole = [chosen.layout.whole(tensor.detach()).flatten().tolist() for tensor in model.state_dict().values()]
    gradients.close()
    return whole


@pytest.mark.parametrize(("strategy", "gather"), SPREAD)
def test_every_rank_trains_the_parameters_and_buffers_of_rank_0(ranks: Ranks, strategy: str, gather: str) -> None:
    for whole in ranks(3, weights_of_a_model_that_differs, strategy, gather):
        assert whole == [[1.0] * size for size in (12, 3, 3, 3, 3, 3, 1)]


def make_gradients(backend: Backend, strategy: Any, gather: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(4, 2, max_norm=1.0))
    strategy_for(strategy, model, world_of(backend, gather)).gradients(model, seed=0)


@pytest.mark.parametrize(("strategy", "gather"), SPREAD)
def test_every_strategy_refuses_what_cannot_give_the_same_bits(ranks: Ranks, strategy: str, gather: str) -> None:
    for outcome in ranks.outcomes(2, make_gradients, strategy, gather):
        assert isinstance(outcome.error, ConfigError)
        assert str(outcome.error).startswith("Embedding (1) has max_norm=1.0: its forward changes its weight")


def test_fsdp_over_several_xla_processes_is_refused() -> None:
    world = World(slots=Slots(2, 0, 2), device=torch.device("xla"), gather=lambda tensor: tensor)
    with pytest.raises(ConfigError, match="over the XLA devices of one rank; connect with spmd=True"):
        strategy_for("fsdp", nn.Linear(1, 1), world)


def test_xla_replicas_need_a_gather() -> None:
    with pytest.raises(ValueError, match=r"expected World\.gather"):
        strategy_for("ddp", nn.Linear(1, 1), World(slots=Slots(1), device=torch.device("xla")))
