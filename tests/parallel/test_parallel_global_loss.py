"""A loss over the global batch, slot by slot: the gradient of one loss over all samples, on any number of ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Err, Ranks
from slot_models import NEEDS_FSDP, slots_of
from torch import Tensor, nn
from torch.nn import functional as F

from disttrain.backend.base import Backend
from disttrain.errors import ConfigError
from disttrain.parallel import GlobalLoss, SlotGradients, Slots, World, strategy_for

STEPS = 3


class Towers(nn.Module):
    """Two towers, and the loss that compares each row of one with all of the other."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(rate), nn.Linear(5, 3))
        self.right = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor([0.5]))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("losses", torch.zeros(()))

    def embed(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            self.seen += x.sum()
        return {"left": self.left(x), "right": self.right(x), "index": torch.arange(len(x))}

    def loss(self, embeddings: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            self.losses += 1
        logits = embeddings["left"] @ embeddings["right"].T * self.scale.exp()
        return F.cross_entropy(logits, torch.arange(len(logits)))


def towers(rate: float = 0.0) -> Towers:
    torch.manual_seed(3)
    return Towers(rate).double()


def samples(step: int) -> Tensor:
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.5)


Embed = Callable[[Towers, Tensor], Any]


def trained(
    backend: Backend,
    num_slots: int,
    strategy: Any = "ddp",
    rate: float = 0.0,
    embed: Embed = Towers.embed,
    loss: Callable[[Towers, Any], Tensor] = Towers.loss,
    scale: float = 1.0,
) -> tuple[list[bytes], list[Tensor], list[float]]:
    """Return the bytes of weights and buffers, the weights and the slots' losses, after three steps."""
    net, slots = towers(rate), slots_of(backend, num_slots)
    world = World(slots=slots, device=torch.device("cpu"), process_group=backend.process_group, rehearses=True)
    chosen = strategy_for(strategy, net, world)
    gradients = chosen.gradients(net, seed=0)
    whole = GlobalLoss(
        slots,
        backend.process_group,
        embed=lambda x: embed(net, x),
        loss=lambda embeddings: loss(net, embeddings),
        backward=lambda value: (value * scale).backward(),
        parameters=net.parameters,
    )
    gradients.minimize(whole, rehearses=True)
    optimizer, losses = sgd(net), []
    for step in range(STEPS):
        parts = samples(step).chunk(num_slots)
        for x in gradients.microbatches([parts[slot] for slot in slots.mine], step + 1):
            value = whole.slot_loss(embed(net, x))
            (value * scale).backward()
            losses.append(float(value.detach()))
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.grad /= scale
        optimizer.step()
    weights = [chosen.layout.whole(each.detach()).clone() for each in net.parameters()]
    return [each.numpy().tobytes() for each in [*weights, *net.buffers()]], weights, losses


def by_hand() -> tuple[list[Tensor], list[float]]:
    """Train by whole batches, with one forward and one loss for each; return the weights and the losses."""
    net, losses = towers(), []
    optimizer = sgd(net)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = net.loss(net.embed(samples(step)))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return [each.detach() for each in net.parameters()], losses


@pytest.mark.parametrize("num_slots", [1, 3, 4, 12])
def test_the_gradient_is_that_of_one_loss_over_the_whole_batch(ranks: Ranks, num_slots: int) -> None:
    weights, losses = by_hand()
    _, its_weights, its_losses = ranks(1, trained, num_slots)[0]
    for here, there in zip(its_weights, weights, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-14)
    assert len(its_losses) == STEPS * num_slots + 1  # the first slot is rehearsed
    assert its_losses[1::num_slots] == [pytest.approx(each, rel=1e-12) for each in losses]
    assert its_losses[-num_slots:] == [its_losses[-1]] * num_slots


def spread(rows: Tensor) -> Tensor:
    """Return a loss in which every row meets every other, several times (as in VICReg)."""
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / len(rows)
    return covariance.pow(2).sum() + (1 - covariance.diagonal().clamp(min=1e-3).sqrt()).relu().mean()


@given(num_slots=st.integers(1, 7), num_rows=st.integers(1, 4), width=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_slots_gradients_add_up_to_that_of_the_whole(num_slots: int, num_rows: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, width)).double()
    x = torch.randn(num_slots * num_rows, 3, dtype=torch.float64)
    expected = torch.autograd.grad(spread(net(x)), list(net.parameters()))
    gradients = SlotGradients(net, Slots(num_slots), seed=seed)
    whole = GlobalLoss(
        Slots(num_slots), None, embed=net, loss=spread, backward=torch.autograd.backward, parameters=net.parameters
    )
    gradients.minimize(whole, rehearses=False)
    for rows in gradients.microbatches(x.chunk(num_slots), 1):
        whole.slot_loss(net(rows)).backward()
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


@NEEDS_FSDP
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_any_number_of_ranks_has_the_same_bits(ranks: Ranks, strategy: str) -> None:
    whole, _, losses = ranks(1, trained, 4, "ddp", 0.3)[0]
    for world_size in (2, 3):
        for its_bytes, _, its_losses in ranks(world_size, trained, 4, strategy, 0.3):
            assert its_bytes == whole
            assert set(its_losses) == set(losses)


def test_a_scaled_loss_has_the_gradient_once_scaled(ranks: Ranks) -> None:
    (plain, *_), (scaled, *_) = (ranks(1, trained, 3, "ddp", 0.0, Towers.embed, Towers.loss, s)[0] for s in (1.0, 64.0))
    assert scaled == plain


class Saved:
    """A tensor that autograd has saved, and the bytes of all that are saved at a time."""

    now = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Saved.now += tensor.nbytes
        Saved.most = max(Saved.most, Saved.now)

    def __del__(self) -> None:
        Saved.now -= self.tensor.nbytes


def most_saved(num_slots: int) -> int:
    """Return the most bytes that autograd holds in a step of 512 samples."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    whole = GlobalLoss(
        Slots(num_slots), None, embed=net, loss=spread, backward=torch.autograd.backward, parameters=net.parameters
    )
    gradients = SlotGradients(net, Slots(num_slots), seed=0)
    gradients.minimize(whole, rehearses=False)
    Saved.now = Saved.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):  # type: ignore[no-untyped-call]
        for rows in gradients.microbatches(torch.ones(512, 4).chunk(num_slots), 1):
            whole.slot_loss(net(rows)).backward()
    return Saved.most


def test_only_one_slot_has_activations_at_a_time() -> None:
    assert most_saved(16) < most_saved(1) / 3  # what is left is that of the loss over all rows


def with_scale(net: Towers, x: Tensor) -> Any:
    return net.left(x), net.right(x), net.scale.exp().expand(len(x), 1)


def loss_with_scale(net: Towers, embeddings: Any) -> Tensor:
    left, right, scale = embeddings
    left.mul_(scale)  # in place: what it is given is its own
    return F.cross_entropy(left @ right.T, torch.arange(len(left)))


def test_a_number_of_the_model_is_a_row_for_each_sample(ranks: Ranks) -> None:
    weights, _ = by_hand()
    for world_size in (1, 3):
        _, its_weights, _ = ranks(world_size, trained, 4, "ddp", 0.0, with_scale, loss_with_scale)[0]
        for here, there in zip(its_weights, weights, strict=True):
            torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-14)


def test_several_ranks_need_a_process_group() -> None:
    with pytest.raises(ValueError, match="world_size=2 needs a process group"):
        GlobalLoss(Slots(4, 0, 2), None, embed=abs, loss=abs, backward=print, parameters=list)


def longer_elsewhere(net: Towers, x: Tensor) -> Any:
    rows = 1 if dist.is_initialized() and dist.get_rank() else 2
    return net.embed(x[:rows])


def other_name_in_a_later_slot(net: Towers, x: Tensor) -> Any:
    embeddings = net.embed(x)
    return embeddings if torch.equal(x, samples(0)[:3]) else {**embeddings, "extra": x}


def without_gradient(net: Towers, x: Tensor) -> Any:
    return {name: each.detach() for name, each in net.embed(x).items()}


def by_mode(net: Towers, x: Tensor) -> Any:
    embeddings = net.embed(x)
    return embeddings if torch.is_grad_enabled() else {**embeddings, "left": -embeddings["left"]}


def gathers(net: Towers, x: Tensor) -> Any:
    if dist.is_initialized():
        dist.all_reduce(torch.ones(1))
    return net.embed(x)


def constant(net: Towers, embeddings: Any) -> Tensor:
    return net.scale.sum() * embeddings["left"].detach().sum()


def gathering_loss(net: Towers, embeddings: Any) -> Tensor:
    dist.broadcast(torch.ones(1), src=0)
    return net.loss(embeddings)


def moving_loss(net: Towers, embeddings: Any) -> Tensor:
    net.scale.data.clamp_(max=0.4)
    return net.loss(embeddings)


class Queue:
    rows: list[Tensor] = []


def queueing_loss(net: Towers, embeddings: Any) -> Tensor:
    Queue.rows = [*Queue.rows[-3:], embeddings["right"].detach()]
    logits = embeddings["left"] @ torch.cat([embeddings["right"], *Queue.rows[:-1]]).T
    return F.cross_entropy(logits, torch.arange(len(logits)))


@pytest.mark.parametrize(
    ("world_size", "embed", "loss", "words"),
    [
        (2, longer_elsewhere, Towers.loss, "expected embeddings of one form in all slots"),
        (1, other_name_in_a_later_slot, Towers.loss, r"and .*\['extra'\] torch.float64 \[3, 4\]; give every sample"),
        (1, without_gradient, constant, "has no gradient by any of them"),
        (1, by_mode, Towers.loss, "slot 0 gives other embeddings in the second run"),
        (2, gathers, Towers.loss, "forward: expected no call of torch.distributed, got a collective"),
        (2, Towers.embed, gathering_loss, "global_loss: expected no call of torch.distributed, got a collective"),
        (1, Towers.embed, moving_loss, "changes its parameter scale"),
        (1, Towers.embed, queueing_loss, r"the embeddings \(by global_loss\) and .* changes when"),
    ],
)
def test_what_has_no_such_gradient_is_refused(ranks: Ranks, world_size: int, embed: Any, loss: Any, words: str) -> None:
    for outcome in ranks.outcomes(world_size, trained, 4, "ddp", 0.0, embed, loss):
        assert isinstance(outcome, Err)
        assert isinstance(outcome.error, ConfigError)
        with pytest.raises(ConfigError, match=words):
            raise outcome.error
