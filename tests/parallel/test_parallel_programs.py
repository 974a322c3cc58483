"""Programs that use a model as they like: the same bits on any number of ranks, whole or sharded, as by hand."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from ranks import Ranks
from slot_models import NEEDS_FSDP, digest, slots_of
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from disttrain.backend.base import Backend
from disttrain.parallel import World, strategy_for

NUM_SLOTS = 3
STEPS = 4


class Net(nn.Module):
    """An encoder with methods, blocks in a list, a decoder, and a loss with a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(3, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.loss = Scaled()

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return self.decoder(self.encode(x))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((2,), 0.7))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, got: Tensor, expected: Tensor) -> Tensor:
        self.seen += got.detach().mean()
        return mse_loss(got * self.scale.mean() + self.seen, expected)


def method_alone(net: Net, x: Tensor) -> Tensor:
    return net.encode(x).square().mean()


def method_and_call(net: Net, x: Tensor) -> Tensor:
    return net.loss(net(x), x) + 0.1 * net.encode(x).square().mean()


def some_slots_leave_it_out(net: Net, x: Tensor) -> Tensor:
    return mse_loss(net(x), x) if float(x[0, 0]) > 0 else torch.zeros((), requires_grad=True)


def called_three_times(net: Net, x: Tensor) -> Tensor:
    return mse_loss(net(x), net(x + 0.1).detach() * 0.5) + mse_loss(net(2 * x), x)


def its_weights_are_read(net: Net, x: Tensor) -> Tensor:
    return mse_loss(net(x) + x @ net.blocks[0].weight, x) + 0.01 * sum(p.square().sum() for p in net.parameters())


def recomputed_twice(net: Net, x: Tensor) -> Tensor:
    hidden = x.clone().requires_grad_(True)
    for block in (*net.blocks, *net.blocks):
        hidden = checkpoint(block, hidden, use_reentrant=True)
    return hidden.square().mean()


def other_weights_for_a_call(net: Net, x: Tensor) -> Tensor:
    weights = {name: parameter * 1.01 for name, parameter in net.named_parameters()}
    return mse_loss(torch.func.functional_call(net, weights, (x,)), x)


def gradient_of_the_gradient(net: Net, x: Tensor) -> Tensor:
    inputs = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(net(inputs).sum(), inputs, create_graph=True)
    return slope.square().mean()


def norm_of_its_own_gradient(net: Net, x: Tensor) -> Tensor:
    loss = mse_loss(net(x), x)
    weights = list(net.blocks[0].parameters())
    slopes = torch.autograd.grad(loss, weights, create_graph=True)
    return loss + 0.1 * sum(slope.square().sum() for slope in slopes)


def norm_of_all_its_gradients(net: Net, x: Tensor) -> Tensor:
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    slopes = torch.autograd.grad(net.loss(net(x), x), weights, create_graph=True)
    return mse_loss(net(x), x) + 0.1 * sum(slope.square().sum() for slope in slopes)


def one_step_of_its_own(net: Net, x: Tensor) -> Tensor:
    """Take a step by hand and compute the loss with the weights after it, as MAML does."""
    named = {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
    slopes = torch.autograd.grad(mse_loss(net(x), x), list(named.values()), create_graph=True, allow_unused=True)
    pairs = zip(named.items(), slopes, strict=True)
    moved = {name: weight if slope is None else weight - 0.1 * slope for (name, weight), slope in pairs}
    return mse_loss(torch.func.functional_call(net, moved, (x + 0.1,)), x)


PROGRAMS: list[Callable[[Net, Tensor], Tensor]] = [
    method_alone,
    method_and_call,
    some_slots_leave_it_out,
    called_three_times,
    its_weights_are_read,
    recomputed_twice,
    other_weights_for_a_call,
    gradient_of_the_gradient,
    norm_of_its_own_gradient,
    norm_of_all_its_gradients,
    one_step_of_its_own,
]


def batch(step: int) -> Tensor:
    """Return the samples of a step, [slots, samples, features]."""
    return torch.randn(NUM_SLOTS, 5, 4, generator=torch.Generator().manual_seed(step))


def flags_at(step: int, net: Net) -> None:
    """Freeze and unfreeze parts, as handlers do between steps."""
    net.encoder.requires_grad_(step != 2)
    net.blocks[1].requires_grad_(step >= 1)


def all_programs(backend: Backend, strategy: Any) -> list[tuple[str, list[Tensor]]]:
    """Return, for each program, the hash of the state and the gradients of the last step."""
    results = []
    for program in PROGRAMS:
        torch.manual_seed(1)
        net, slots = Net(), slots_of(backend, NUM_SLOTS)
        world = World(slots=slots, device=torch.device("cpu"), process_group=backend.process_group)
        chosen = strategy_for(strategy, net, world)
        gradients: Any = chosen.gradients(net, seed=0)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for step in range(STEPS):
            flags_at(step, net)
            for x in gradients.microbatches([batch(step)[slot] for slot in slots.mine], step + 1):
                loss = program(net, x)
                if loss.requires_grad:
                    loss.backward()
            optimizer.step()
        state = {name: chosen.layout.whole(tensor.detach()) for name, tensor in net.state_dict().items()}
        holder = nn.ParameterList(nn.Parameter(each, requires_grad=False) for each in state.values())
        whole = [chosen.layout.whole(each.grad) for each in net.parameters() if each.grad is not None]
        results.append((digest(holder), whole))
    return results


@lru_cache
def of_one_rank(ranks: Ranks) -> list[tuple[str, list[Tensor]]]:
    results: list[tuple[str, list[Tensor]]] = ranks(1, all_programs, "ddp")[0]
    return results


@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [(2, "ddp"), (3, "ddp"), (1, "fsdp"), *(pytest.param(size, "fsdp", marks=NEEDS_FSDP) for size in (2, 3))],
)
def test_any_use_of_a_model_gives_the_same_bits(ranks: Ranks, world_size: int, strategy: str) -> None:
    alone = [hashed for hashed, _ in of_one_rank(ranks)]
    assert len(set(alone)) == len(PROGRAMS)
    for results in ranks(world_size, all_programs, strategy):
        got = [hashed for hashed, _ in results]
        assert [p.__name__ for p, a, b in zip(PROGRAMS, alone, got, strict=True) if a != b] == []


@pytest.mark.parametrize("number", range(len(PROGRAMS)), ids=[program.__name__ for program in PROGRAMS])
def test_one_rank_computes_what_a_loop_by_hand_computes(ranks: Ranks, number: int) -> None:
    torch.manual_seed(1)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(STEPS):
        flags_at(step, net)
        optimizer.zero_grad()
        seen = net.loss.seen.clone()
        for slot in reversed(range(NUM_SLOTS)):  # slot 0 last: it leaves its buffers
            net.loss.seen.copy_(seen)
            loss = PROGRAMS[number](net, batch(step)[slot]) / NUM_SLOTS
            if loss.requires_grad:
                loss.backward()
        for parameter in net.parameters():
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    by_hand = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    for got, expected in zip(of_one_rank(ranks)[number][1], by_hand, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=1e-6)


def halve(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def hooked(backend: Backend) -> str:
    """Train with hooks on parameters, one of which only some slots use, and a complex parameter beside real ones."""
    torch.manual_seed(1)
    net, slots = Net(), slots_of(backend, NUM_SLOTS)
    net.filter = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    net.decoder.weight.register_hook(lambda gradient: gradient + 0.1)
    net.encoder.weight.register_post_accumulate_grad_hook(halve)
    world = World(slots=slots, device=torch.device("cpu"), process_group=backend.process_group)
    gradients: Any = strategy_for("ddp", net, world).gradients(net, seed=0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for step in range(STEPS):
        for x in gradients.microbatches([batch(step)[slot] for slot in slots.mine], step + 1):
            loss = torch.fft.irfft(torch.fft.rfft(x) * net.filter, n=4).square().mean()
            if float(x[0, 0]) > 0:
                loss = loss + mse_loss(net(x), x)
            loss.backward()
        optimizer.step()
    holder = nn.ParameterList([*(p.detach() for p in net.parameters() if not p.is_complex())])
    return digest(holder) + str(torch.view_as_real(net.filter.detach()).tolist())


def test_hooks_on_parameters_and_complex_parameters(ranks: Ranks) -> None:
    (alone,) = ranks(1, hooked)
    for world_size in (2, 3):
        assert ranks(world_size, hooked) == [alone] * world_size
