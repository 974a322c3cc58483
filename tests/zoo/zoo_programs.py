"""Random programs: models, losses, freezing, hooks, dtypes and slots, put together as nobody has put them together yet.

A `Program` is plain data, so that hypothesis can shrink it and a rank can build it. All blocks take and return
[samples, 4].
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset
from zoo_lives import Fields
from zoo_losses import Scaled
from zoo_models import Clamp


class Block(nn.Module):
    """One block of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = self._layer()
        if kind == "tied":
            self.second = nn.Linear(4, 4)
            self.second.weight = self.layer.weight
        if kind == "parameter":
            self.scale = nn.Parameter(torch.ones(1, 4))
        if kind in ("buffer", "buffer_anew"):
            self.register_buffer("seen", torch.zeros(4))
            self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        if kind in ("frozen", "teacher"):
            self.layer.requires_grad_(False)

    def _layer(self) -> nn.Module:
        made = {
            "conv": lambda: nn.Conv2d(1, 4, 2),
            "batch_norm": lambda: nn.BatchNorm1d(4),
            "layer_norm": lambda: nn.LayerNorm(4),
            "group_norm": lambda: nn.GroupNorm(2, 4),
            "instance_norm": lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
            "embedding": lambda: nn.Embedding(8, 4),
            "gru": lambda: nn.GRU(2, 2, batch_first=True),
            "lstm": lambda: nn.LSTM(2, 2, batch_first=True),
            "attention": lambda: nn.MultiheadAttention(2, 1, dropout=0.1, batch_first=True),
            "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
            "checkpoint": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3)),
        }
        return made.get(self.kind, lambda: nn.Linear(4, 4))()

    def forward(self, x: Tensor) -> Tensor:
        kind, layer = self.kind, self.layer
        if kind == "conv":
            return layer(x.reshape(-1, 1, 2, 2)).reshape(-1, 4)
        if kind in ("gru", "lstm"):
            return layer(x.reshape(-1, 2, 2))[0].reshape(-1, 4)
        if kind == "attention":
            pairs = x.reshape(-1, 2, 2)
            return layer(pairs, pairs, pairs)[0].reshape(-1, 4)
        if kind == "instance_norm":
            return layer(x.reshape(-1, 2, 2)).reshape(-1, 4)
        if kind == "embedding":
            return x + layer((x.detach().abs() * 3).long().clamp(max=7)).mean(1)
        if kind == "dropout":
            return F.dropout(layer(x), 0.4, self.training)
        if kind == "noise":
            return layer(x) + 0.1 * torch.randn_like(x)
        if kind == "twice":
            return layer(layer(x).tanh())
        if kind == "tied":
            return self.second(layer(x).tanh())
        if kind == "unused":
            return x
        if kind == "branch":  # taken by some slots alone
            return layer(x) if x.detach()[0].sum() > 0 else x
        if kind == "depth":  # taken by chance
            return x + layer(x) if torch.rand(()) < 0.5 else x
        if kind == "parameter":
            return layer(x) * self.scale
        if kind == "checkpoint":
            return checkpoint(layer, x, use_reentrant=False) if self.training else layer(x)
        if kind == "custom":
            return Clamp.apply(layer(x))
        if self.training and kind in ("buffer", "buffer_anew", "teacher"):
            self._move(x.detach())
        return layer(x - 0.1 * self.seen if kind.startswith("buffer") else x).tanh()

    @torch.no_grad()
    def _move(self, x: Tensor) -> None:
        if self.kind == "teacher":
            for parameter in self.layer.parameters():
                parameter.lerp_(x.mean().expand_as(parameter), 0.1)
            return
        if self.kind == "buffer":
            self.seen.lerp_(x.mean(0), 0.3)
        else:
            self.seen = self.seen * 0.5 + x.mean(0)
        self.count += 1


KINDS = (
    *("linear", "conv", "batch_norm", "layer_norm", "group_norm", "instance_norm", "embedding", "gru", "lstm"),
    *("attention", "weight_norm", "checkpoint", "dropout", "noise", "twice", "tied", "unused", "branch", "depth"),
    *("parameter", "custom", "buffer", "buffer_anew", "frozen", "teacher"),
)
LOSSES = ("mse", "learned", "plain", "twice", "method", "penalty", "gradient_penalty", "without_model")
HOOKS = ("", "gradient", "accumulated", "forward", "backward")


class Net(nn.Module):
    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind) for kind in kinds)
        self.out = nn.Linear(4, 1)

    def encode(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encode(x))


@dataclass(frozen=True)
class Program:
    """One random program; `fields` are those of its Config."""

    kinds: tuple[str, ...]
    loss: str = "mse"
    hook: str = ""
    optimizer: str = "adamw"
    dtype: str = "float32"
    num_slots: int = 3
    slot_size: int = 3
    grad_clip_norm: float | None = None
    weighted: bool = False
    freezes: tuple[tuple[int, int, bool], ...] = field(default=())
    """(step, block, frozen): set when the step begins."""

    def model(self) -> nn.Module:
        net = Net(self.kinds).to(getattr(torch, self.dtype))
        set_hook(net, self.hook)
        return net

    def data(self, n: int, seed: int) -> TensorDataset:
        x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, self.dtype))
        return TensorDataset(x, x.sum(1, keepdim=True))

    def fields(self) -> Fields:
        kinds = {
            "adamw": partial(torch.optim.AdamW, lr=1e-2),
            "sgd": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.01),
            "nadam": partial(torch.optim.NAdam, lr=1e-2),
            "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, centered=True),
        }
        size = self.num_slots * self.slot_size
        losses = {"mse": nn.MSELoss, "learned": Scaled}
        answer = {"loss": losses[self.loss]()} if self.loss in losses else {"forward": partial(forward, self.loss)}
        return {
            "model": self.model,
            "train_data": lambda: self.data(3 * size + 1, 0),
            "valid_data": None if self.loss in ("gradient_penalty", "without_model") else lambda: self.data(7, 1),
            "checkpoint": {"every_steps": 2},
            "optimizer": kinds[self.optimizer],
            "global_batch_size": size,
            "num_slots": self.num_slots,
            "grad_clip_norm": self.grad_clip_norm,
            "weight": positive if self.weighted else None,
            **answer,
        }

    def step_begins(self, model: Any, step: int) -> None:
        for begins, block, frozen in self.freezes:
            if step >= begins:  # by position: a resumed run sets it too
                model.blocks[block % len(self.kinds)].requires_grad_(not frozen)


def set_hook(net: Net, hook: str) -> None:
    layer = net.blocks[0].layer
    if hook == "gradient":
        net.out.weight.register_hook(lambda gradient: gradient * 0.5 + 0.01)
    elif hook == "accumulated":
        net.out.weight.register_post_accumulate_grad_hook(halve)
    elif hook == "forward":
        layer.register_forward_pre_hook(lambda module, args: None)
        net.out.register_forward_hook(lambda module, args, output: output * 0.9)
    elif hook == "backward":
        net.out.register_full_backward_pre_hook(lambda module, gradients: tuple(g * 0.5 for g in gradients))


def positive(batch: Any) -> int:
    """Return the weight of a slot: its samples whose first value is positive, of which there may be none."""
    return int((batch[0][:, 0] > 0).sum())


def halve(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def forward(kind: str, model: Any, batch: Any) -> tuple[Tensor, Any]:
    x, y = batch
    if kind == "without_model" and x[0, 0] > 0:
        return torch.zeros((), requires_grad=True), None
    if kind == "method":
        return F.mse_loss(model(x), y) + 0.1 * model.encode(x).pow(2).mean(), None
    if kind == "gradient_penalty":
        x = x.clone().requires_grad_()
        y_pred = model(x)
        (slope,) = torch.autograd.grad(y_pred.sum(), x, create_graph=True)
        return F.mse_loss(y_pred, y) + 0.1 * slope.pow(2).mean(), None
    loss = F.mse_loss(model(x), y)
    if kind == "twice":
        loss = loss + 0.1 * model(x.flip(0)).pow(2).mean()
    if kind == "penalty":
        loss = loss + 1e-2 * sum(parameter.pow(2).sum() for parameter in model.parameters())
    return loss, None


def programs() -> st.SearchStrategy[Program]:
    """Return the random programs."""
    kinds = st.sampled_from(KINDS)
    return st.builds(
        Program,
        kinds=st.lists(kinds, min_size=1, max_size=5).map(tuple),
        loss=st.sampled_from(LOSSES),
        hook=st.sampled_from(HOOKS),
        optimizer=st.sampled_from(["adamw", "sgd", "nadam", "rmsprop"]),
        dtype=st.sampled_from(["float32", "float32", "float64", "bfloat16"]),
        num_slots=st.sampled_from([3, 3, 4, 5, 6]),
        slot_size=st.sampled_from([2, 3]),
        grad_clip_norm=st.sampled_from([None, 0.1]),
        weighted=st.booleans(),
        freezes=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 4), st.booleans()), max_size=2).map(tuple),
    ).filter(is_valid)


def is_valid(program: Program) -> bool:
    """Return whether a program is one: a second call must not move what the first one's backward needs."""
    calls_twice = "teacher" in program.kinds and program.loss in ("twice", "method")
    thawed = {program.kinds[block % len(program.kinds)] for _, block, frozen in program.freezes if not frozen}
    return not calls_twice and "teacher" not in thawed  # what the forward moves may not be trained
