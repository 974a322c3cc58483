"""Training by slots on real ranks: each model and number of slots gives one hash, on any number of ranks."""

import logging
import os
import random
import signal
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import slot_models
import torch
from ranks import Died, Err, Ranks
from slot_models import digest, microbatch, slots_of, train
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from disttrain.backend.base import Backend
from disttrain.errors import ConfigError
from disttrain.parallel import Gradients, SlotGradients, Slots
from disttrain.seeding import seed_for

RUNS = [(name, num_slots) for name in ("mlp", "cnn", "bf16") for num_slots in (8, 6)] + [("mixed", 6), ("wide", 5)]


def hashes(backend: Backend, with_group: bool) -> dict[tuple[str, int], str]:
    group = backend.process_group if with_group else None
    digests = {}
    for name, num_slots in RUNS:
        if backend.world_size <= num_slots:
            steps = 2 if name == "wide" else slot_models.STEPS
            digests[name, num_slots] = digest(train(name, slots_of(backend, num_slots), group, steps))
    return digests


@lru_cache
def of_one_process(ranks: Ranks) -> dict[tuple[str, int], str]:
    digests: dict[tuple[str, int], str] = ranks(1, hashes, False)[0]
    return digests


SIZES = [1, 2, 3, 4, 5, pytest.param(8, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world_size", SIZES)
def test_weights_have_the_same_bits_on_any_number_of_ranks(ranks: Ranks, world_size: int) -> None:
    alone = of_one_process(ranks)
    assert len(set(alone.values())) == len(RUNS)
    for digests in ranks(world_size, hashes, True):
        assert digests == {run: alone[run] for run in digests}
        assert len(digests) == sum(num_slots >= world_size for _, num_slots in RUNS)


def fast(backend: Backend) -> tuple[str, dict[str, Tensor]]:
    model = train("mlp", slots_of(backend, 8), backend.process_group, reduction="fast")
    return digest(model), model.state_dict()


def test_the_fast_reduction_agrees_and_repeats_but_has_other_bits_on_other_ranks(ranks: Ranks) -> None:
    alone = train("mlp", Slots(8), None)
    digests = {}
    for world_size in (2, 3, 5):
        by_rank = ranks(world_size, fast)
        (digests[world_size],) = {hashed for hashed, _ in by_rank}
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(by_rank[0][1][name], tensor, rtol=1e-3, atol=1e-4)
    assert ranks(3, fast)[0][0] == digests[3]
    # So the test above would notice an addition in another order.
    assert digests[3] != of_one_process(ranks)["mlp", 8] != digests[5]


def gradients_of_one_step(backend: Backend) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 10)).double()
    gradients = SlotGradients(model, slots_of(backend, 6), seed=0, process_group=backend.process_group)
    for x, y in gradients.microbatches([microbatch("mlp", 0, slot) for slot in gradients.slots.mine], 1):
        cross_entropy(gradients.module(x.double()), y).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_gradient_is_that_of_the_mean_loss_over_the_global_batch(ranks: Ranks, world_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 10)).double()
    batches = [microbatch("mlp", 0, slot) for slot in range(6)]
    x, y = torch.cat([x for x, _ in batches]).double(), torch.cat([y for _, y in batches])
    cross_entropy(model(x), y).backward()
    for gradient in ranks(world_size, gradients_of_one_step):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-12, atol=1e-14)


def test_before_each_microbatch_torch_is_seeded_and_the_others_are_left_alone() -> None:
    gradients = SlotGradients(slot_models.mlp(), Slots(3), seed=11)
    python, numpy = random.getstate(), np.random.get_state()[1]
    seeds = []
    for x, y in gradients.microbatches([microbatch("mlp", 0, slot) for slot in range(3)], 5):
        seeds.append(torch.initial_seed())
        cross_entropy(gradients.module(x), y).backward()
    assert seeds == [seed_for(11, "step", 4, slot) for slot in range(3)]
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)


def test_it_obeys_the_protocol_of_the_step_body() -> None:
    gradients: Gradients = SlotGradients(slot_models.mlp(), Slots(2), seed=0)
    assert gradients.several
    assert gradients.divisor == 1
    assert all(gradients.opens(i) and gradients.closes(i) for i in (1, 2, 3))


def test_gradients_from_before_do_not_count() -> None:
    model = slot_models.mlp()
    gradients = SlotGradients(model, Slots(2), seed=0)
    batch = [microbatch("mlp", 0, slot) for slot in range(2)]
    totals = []
    for leftover in (0.0, 1e3):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, leftover)
        for x, y in gradients.microbatches(batch, 1):
            cross_entropy(gradients.module(x), y).backward()
        totals.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *totals))


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def warnings_of_unused(backend: Backend) -> tuple[list[str], list[Tensor | None]]:
    records = Records()
    logger = logging.getLogger("disttrain.parallel.trained_parameters")
    logger.addHandler(records)
    try:
        model = train("mixed", slots_of(backend, 6), backend.process_group, steps=3)
    finally:
        logger.removeHandler(records)
    return records.messages, [model.never.weight.grad, model.frozen.weight.grad]


@pytest.mark.parametrize("world_size", [1, 2, 6])
def test_parameters_without_a_gradient_count_as_zero_and_are_named_once(ranks: Ranks, world_size: int) -> None:
    for rank, (messages, (never, frozen)) in enumerate(ranks(world_size, warnings_of_unused)):
        assert torch.equal(never, torch.zeros(3, 3))
        assert frozen is None
        assert len(messages) == 1
        assert messages[0].startswith(f"step 1: no slot of rank {rank} used the parameters")
        assert "never.weight, never.bias" in messages[0]
        assert ("sometimes.weight" in messages[0]) == (world_size == 6 and rank % 2 == 1)


def step_after_a_failure(backend: Backend) -> str:
    torch.manual_seed(0)
    model = slot_models.mlp()
    gradients = SlotGradients(model, slots_of(backend, 6), seed=0, process_group=backend.process_group)
    batch = [microbatch("mlp", 0, slot) for slot in gradients.slots.mine]
    microbatches = gradients.microbatches(batch, 1)
    x, y = next(microbatches)
    cross_entropy(gradients.module(x), y).backward()
    with pytest.raises(ZeroDivisionError):
        microbatches.throw(ZeroDivisionError("an error of the user's code, in the first microbatch"))
    for x, y in gradients.microbatches(batch, 1):
        cross_entropy(gradients.module(x), y).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
    return digest(model)


def test_a_step_that_failed_leaves_nothing_for_the_next(ranks: Ranks) -> None:
    alone = ranks(1, step_after_a_failure)
    assert ranks(3, step_after_a_failure) == alone * 3


def backward_without_a_peer(backend: Backend) -> None:
    gradients = SlotGradients(slot_models.wide(), slots_of(backend, 2), seed=0, process_group=backend.process_group)
    for step in range(3):
        for x, y in gradients.microbatches([microbatch("wide", step, backend.rank)], step + 1):
            loss = cross_entropy(gradients.module(x), y)
            if step == 1 and backend.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            loss.backward()


def test_a_dead_peer_is_a_runtime_error_from_the_backward(ranks: Ranks) -> None:
    alive, dead = ranks.outcomes(2, backward_without_a_peer, fresh=True)
    assert isinstance(dead, Died)
    assert isinstance(alive, Err)
    assert isinstance(alive.error, RuntimeError)
    assert "loss.backward()" in alive.text
    assert "Connection" in str(alive.error)


def compiled_hash(backend: Backend) -> str:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(600_000))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.gelu(x * self.weight)

    torch.manual_seed(0)
    model = nn.Sequential(Scale(), Scale(), Scale()).bfloat16()
    compiled: Any = torch.compile(lambda x: model(x).float().mean())
    holder = nn.Module()
    holder.model, holder.forward = model, compiled
    gradients = SlotGradients(holder, slots_of(backend, 2), seed=0, process_group=backend.process_group)
    for step in range(2):
        batch = [torch.randn(600_000, generator=torch.Generator().manual_seed(slot)) for slot in gradients.slots.mine]
        for x in gradients.microbatches(batch, step + 1):
            gradients.module(x.bfloat16()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e4 * parameter.grad
    return digest(model)


@pytest.mark.slow
def test_a_compiled_model_is_not_cut_where_buckets_end(ranks: Ranks) -> None:
    alone = ranks(1, compiled_hash, timeout_s=150, fresh=True)
    assert ranks(2, compiled_hash, timeout_s=150, fresh=True) == alone * 2


def test_a_batch_of_another_number_of_microbatches_is_refused() -> None:
    gradients = SlotGradients(slot_models.mlp(), Slots(4), seed=0)
    with pytest.raises(ValueError, match="expected 4 microbatches, for the slots 0 to 3; got 3"):
        next(gradients.microbatches([microbatch("mlp", 0, slot) for slot in range(3)], 1))


def test_an_unknown_reduction_is_refused() -> None:
    reduction: Any = "exact"
    with pytest.raises(ConfigError, match=r"""expected reduction="invariant" or "fast", got 'exact'"""):
        SlotGradients(slot_models.mlp(), Slots(2), seed=0, reduction=reduction)
