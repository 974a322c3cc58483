"""A collective in the user's forward is refused in the first step of a run on several ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Err, Ranks
from slot_models import NEEDS_FSDP, slots_of
from torch import Tensor, nn

from disttrain.backend.base import Backend
from disttrain.errors import ConfigError
from disttrain.parallel import World, strategy_for
from disttrain.parallel.user_collectives import without_collectives


def counted(backend: Backend, group: str) -> str:
    chosen = backend.process_group if group == "default" else None
    with without_collectives(chosen, "here", "it is not needed"):
        pass
    try:
        with without_collectives(chosen, "here", "it is not needed"):
            dist.all_reduce(torch.ones(1))
            dist.barrier()
    except ConfigError as error:
        return str(error)
    return ""


def test_collectives_of_the_body_are_counted(ranks: Ranks) -> None:
    expected = "here: expected no call of torch.distributed, got 2 collectives; leave it out: it is not needed"
    assert ranks(2, counted, "default") == [expected] * 2
    assert ranks(2, counted, "none") == [""] * 2


def gathered(model: nn.Module, x: Tensor) -> Tensor:
    """Return the loss of an embedding against those of all ranks, as programs for DDP compute it."""
    here: Tensor = model(x)
    if dist.is_initialized():
        parts = [torch.empty_like(here) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, here.detach())
        here = here - torch.cat(parts).mean(0)
    return here.pow(2).mean()


def step(backend: Backend, strategy: Any, gather: Any, rehearses: bool) -> int:
    slots, model = slots_of(backend, 4), nn.Linear(3, 2)
    world = World(
        slots=slots,
        device=torch.device("cpu"),
        process_group=backend.process_group,
        fsdp_gather=gather,
        rehearses=rehearses,
    )
    gradients = strategy_for(strategy, model, world).gradients(model, seed=0)
    num = 0
    for x in gradients.microbatches([torch.ones(2, 3)] * len(slots.mine), 1):
        gathered(gradients.module, x).backward()
        num += 1
    return num


@NEEDS_FSDP
@pytest.mark.parametrize(("strategy", "gather"), [("ddp", "step"), ("fsdp", "step"), ("fsdp", "module")])
def test_a_forward_that_gathers_is_refused(ranks: Ranks, strategy: str, gather: str) -> None:
    for outcome in ranks.outcomes(2, step, strategy, gather, True):
        assert isinstance(outcome, Err)
        with pytest.raises(ConfigError, match=r"the forward: expected no call of torch\.distributed, got a collective"):
            raise outcome.error


def test_without_a_rehearsal_nothing_is_refused(ranks: Ranks) -> None:
    assert ranks(2, step, "ddp", "step", False) == [2, 2]
