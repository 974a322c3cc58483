"""Each slot is computed by two ranks; a batch that cannot be sent is refused on every rank; off means nothing."""

from typing import Any

import pytest
import torch
from ranks import Err, Ranks
from torch import nn

from disttrain.backend import Backend
from disttrain.errors import ConfigError, FaultyRank
from disttrain.parallel import SlotGradients, Slots
from disttrain.parallel.audit import Audit, faulty_rank
from disttrain.parallel.audit_verdicts import Fault

NUM_SLOTS = 5
CPU = torch.device("cpu")


def computed_slots(backend: Backend, iteration: int) -> list[float]:
    """Return the number of each slot that this rank computes in a step that is audited if it is even."""
    slots = Slots(NUM_SLOTS, backend.rank, backend.world_size)
    gradients = SlotGradients(nn.Linear(1, 1), slots, seed=0, process_group=backend.process_group)
    gradients.audit = Audit(slots, backend.process_group, every_steps=2, device=CPU)
    seen = []
    for batch in gradients.microbatches([torch.full((2, 1), float(slot)) for slot in slots.mine], iteration):
        seen.append(float(batch[0, 0]))
        gradients.module(batch).sum().backward()
    return seen


def generator_batches(backend: Backend) -> None:
    slots = Slots(NUM_SLOTS, backend.rank, backend.world_size)
    gradients = SlotGradients(nn.Linear(1, 1), slots, seed=0, process_group=backend.process_group)
    gradients.audit = Audit(slots, backend.process_group, every_steps=1, device=CPU)
    batches: list[Any] = [torch.ones(2, 1) for _ in slots.mine]
    if backend.rank == 1:
        batches[0] = (each for each in batches)
    for batch in gradients.microbatches(batches, 1):
        gradients.module(batch).sum().backward()


def test_each_rank_computes_its_slots_and_those_of_the_rank_before_it(ranks: Ranks) -> None:
    assert ranks(3, computed_slots, 1) == [[0.0], [1.0, 2.0], [3.0, 4.0]]
    assert ranks(3, computed_slots, 2) == [[0.0, 3.0, 4.0], [1.0, 2.0, 0.0], [3.0, 4.0, 1.0, 2.0]]
    assert ranks(1, computed_slots, 2) == [[0.0, 1.0, 2.0, 3.0, 4.0] * 2]


def test_a_batch_that_cannot_be_sent_is_refused_on_every_rank(ranks: Ranks) -> None:
    for outcome in ranks.outcomes(2, generator_batches):
        assert isinstance(outcome, Err)
        assert isinstance(outcome.error, ConfigError)
        assert "its batch cannot be copied (TypeError" in str(outcome.error)


def test_the_error_names_the_machine_and_the_last_sound_step() -> None:
    faults = [Fault("slot 1", (2,), "transient"), Fault("slot 3", (1,), "persistent")]
    error = faulty_rank(40, faults, [("h0", "cpu"), ("h1", "cuda:3"), ("h2", "cpu")], 30)
    assert isinstance(error, FaultyRank)
    assert (error.rank, error.host, error.device, error.kind, error.step) == (1, "h1", "cuda:3", "persistent", 40)
    for part in ("slot 3", "rank 1 (host h1, cuda:3)", "step 30"):
        assert part in str(error)
    error = faulty_rank(40, [Fault("slot 1", (0, 2), "undecided")], [("h0", "cpu")] * 3, 0)
    assert error.rank is None
    with pytest.raises(FaultyRank, match=r"rank 0 \(host h0, cpu\) or rank 2 .* since this launch began"):
        raise error
