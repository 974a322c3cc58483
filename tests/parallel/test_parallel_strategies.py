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


def test_fsdp_over_several_xla_processes_is_refused() -> None:
    world = World(slots=Slots(2, 0, 2), device=torch.device("xla"), gather=lambda tensor: tensor)
    with pytest.raises(ConfigError, match="over the XLA devices of one rank; connect with spmd=True"):
        strategy_for("fsdp", nn.Linear(1, 1), world)


def test_xla_replicas_need_a_gather() -> None:
    with pytest.raises(ValueError, match=r"expected World\.gather"):
        strategy_for("ddp", nn.Linear(1, 1), World(slots=Slots(1), device=torch.device("xla")))
