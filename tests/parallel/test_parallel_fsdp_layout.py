"""Parameters cut over ranks: the part of each rank, the times when they are whole, and the cuts of a checkpoint."""

import dataclasses
from typing import Any

import pytest
import torch
from ranks import Ranks
from slot_models import microbatch, slots_of
from torch import nn
from torch.nn.functional import cross_entropy

from disttrain.backend.base import Backend
from disttrain.errors import ConfigError
from disttrain.parallel import Slots, World, strategy_for

CPU = torch.device("cpu")


def world(backend: Backend, slots: Slots) -> World:
    return World(slots=slots, device=CPU, process_group=backend.process_group)


def sizes(backend: Backend) -> tuple[int, int, list[tuple[int, ...]]]:
    """Return this rank's number of elements of parameters and of optimizer states, and the parameters' shapes."""
    slots = slots_of(backend, 4)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    strategy_for("fsdp", model, world(backend, slots))
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held: Any = list(model.parameters())
    states: Any = [value for kept in optimizer.state.values() for value in kept.values() if value.ndim]
    return (
        sum(part.to_local().numel() for part in held),
        sum(part.to_local().numel() for part in states),
        [tuple(part.shape) for part in held],
    )


def test_a_rank_holds_its_part_of_parameters_and_optimizer_states(ranks: Ranks) -> None:
    whole = 16 * 64 + 64 + 64 * 16 + 16
    assert ranks(2, sizes) == [(whole // 2, whole, [(64, 16), (64,), (16, 64), (16,)])] * 2


def whole_parameters(backend: Backend, gather: Any) -> list[list[bool]]:
    """Return, by layer, whether the weight is whole: before, within and after each forward, and after the step."""
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 10))
    slots = slots_of(backend, 2)
    spread = dataclasses.replace(world(backend, slots), fsdp_gather=gather)
    gradients = strategy_for("fsdp", model, spread).gradients(model, seed=0)
    whole: list[list[bool]] = []

    def record(*_: Any) -> None:
        whole.append([not hasattr(layer.weight, "to_local") for layer in model])

    record()
    model[1].register_forward_hook(record)  # it runs after FSDP2's own hooks, which were registered before
    batch = [microbatch("mlp", 0, slot) for slot in slots.mine]
    for x, y in gradients.microbatches(batch, 1):
        loss = cross_entropy(gradients.module(x), y)
        record()
        loss.backward()
    record()
    return whole


def test_parameters_are_gathered_module_by_module_or_for_a_step(ranks: Ranks) -> None:
    none, every = [False] * 3, [True] * 3
    assert ranks(2, whole_parameters, "module") == [[none, none, none, none]] * 2
    assert ranks(2, whole_parameters, "step") == [[none, every, every, none]] * 2


class Shadow:
    """An object with a state: a tensor that is cut like its parameter, and one that is whole."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {"first": next(model.parameters()).detach().clone(), "count": torch.zeros(())}

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.tensors}


def cut_as(backend: Backend) -> dict[str, bool]:
    """Return, by path in a checkpoint, whether this rank loads only its part of the tensor."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    layout = strategy_for("fsdp", model, world(backend, slots_of(backend, 2))).layout
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    kept = {"ema": Shadow(model), "second": torch.optim.Adam(model.parameters())}
    cut = layout.cuts({"model": model}, optimizer, kept)
    assert cut is not None
    paths = {
        "model.0.weight": (6, 4),
        "model.1.bias": (2,),
        "model.9.weight": (6, 4),
        "optimizer.state.0.momentum_buffer": (6, 4),
        "optimizer.state.0.step": (),
        "optimizer.state.9.momentum_buffer": (6, 4),
        "kept.ema.shadow.first": (6, 4),
        "kept.ema.shadow.count": (),
        "kept.ema.average.1.weight": (2, 6),
        "kept.ema.average.other": (2, 6),
        "kept.second.state.2.exp_avg": (2, 6),
        "kept.second.state.2.step": (),
    }
    return {path: cut(path, shape) is not None for path, shape in paths.items()}


def test_the_tensors_of_a_checkpoint_are_cut_like_their_counterparts(ranks: Ranks) -> None:
    whole = {
        "model.9.weight",
        "optimizer.state.0.step",
        "optimizer.state.9.momentum_buffer",
        "kept.ema.shadow.count",
        "kept.ema.average.other",
        "kept.second.state.2.step",
    }
    for cut in ranks(2, cut_as):
        assert {path for path, is_cut in cut.items() if not is_cut} == whole


def test_one_rank_refuses_an_optimizer_that_several_would_refuse() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    layout = strategy_for("fsdp", model, World(slots=Slots(1), device=CPU)).layout
    assert layout.cuts({"model": model}, torch.optim.SGD(model.parameters(), lr=0.1), {}) is None
    with pytest.raises(ConfigError, match="Adafactor needs whole parameters"):
        layout.check_optimizer(torch.optim.Adafactor(model.parameters()))
