"""Variants of losses: torch's, modules with parameters or buffers, and functions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from zoo_lives import Fields, mlp, points


def loss(make: Callable[[], Any], **fields: Any) -> Callable[[], Fields]:
    return lambda: {"loss": make(), **fields}


def classes(n: int = 36, seed: int = 0) -> TensorDataset:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long())


LABELLED: Fields = {
    "model": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
    "train_data": classes,
    "valid_data": lambda: classes(10, 5),
}


class Scaled(nn.Module):
    """A learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, y_pred: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(y_pred * self.scale, y)


class Centres(nn.Module):
    """Centre loss: one learned row for each class, and a buffer that follows the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, y_pred: Tensor, y: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.seen += F.one_hot(y, 3).sum(0)
        return F.cross_entropy(y_pred, y) + 0.1 * (y_pred - self.centres[y]).pow(2).mean()


class Running(nn.Module):
    """Divides by a running mean of itself, a buffer; in evaluation it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, y_pred: Tensor, y: Tensor) -> Tensor:
        value = F.mse_loss(y_pred, y)
        if not self.training:
            return value
        with torch.no_grad():
            self.mean.lerp_(value, 0.2)
        return value / self.mean


class Dropped(nn.Module):
    """Drops a part of the targets; a loss module has a mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.4)

    def forward(self, y_pred: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.drop(y_pred), y)


class Counting(nn.Module):
    """A plain number that counts calls: no buffer, no state."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, y_pred: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return F.mse_loss(y_pred, y) * min(1.0, self.calls / 20)


class Perceptual(nn.Module):
    """A frozen network inside the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4)).requires_grad_(False)

    def forward(self, y_pred: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.net(y_pred), self.net(y))


class Uncertain(nn.Module):
    """Two losses weighted by learned variances, one of which a slot may not use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, y_pred: Tensor, y: Tensor) -> Tensor:
        total = F.mse_loss(y_pred, y) * (-self.first).exp() + self.first
        if y.max() > 2.5:
            total = total + F.l1_loss(y_pred, y) * (-self.second).exp() + self.second
        return total.squeeze()


class Regularized:
    """A loss that holds the model's weights through a closure of its own; no module."""

    def __call__(self, y_pred: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(y_pred, y) + 0.1 * y_pred.abs().mean()


def focal(y_pred: Tensor, y: Tensor) -> Tensor:
    p = y_pred.log_softmax(1).gather(1, y[:, None])
    return (-(1 - p.exp()).pow(2) * p).mean()


def hard_examples(y_pred: Tensor, y: Tensor) -> Tensor:
    return (y_pred - y).pow(2).flatten().topk(2).values.mean()


def noisy(y_pred: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(y_pred, y + 0.1 * torch.randn_like(y))


def summed(y_pred: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(y_pred, y, reduction="sum")


def unreduced(y_pred: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(y_pred, y, reduction="none")


class Encoder(nn.Module):
    """Two towers, one with BatchNorm and dropout, the other a frozen teacher that follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3))
        self.teacher = nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.training:
            with torch.no_grad():
                self.teacher.weight.lerp_(self.student[3].weight[:, :4], 0.1)
        return {"left": F.normalize(self.student(x)), "right": F.normalize(self.teacher(x))}


class Contrastive(nn.Module):
    """Each row of one embedding against all of the other, and noise; the temperature is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, embeddings: dict[str, Tensor]) -> Tensor:
        logits = embeddings["left"] @ embeddings["right"].T * self.scale.exp()
        logits = logits + 0.1 * torch.randn_like(logits) if self.training else logits
        return F.cross_entropy(logits.float(), torch.arange(len(logits)))


class Queued(nn.Module):
    """A contrastive loss with the rows of earlier batches as further negatives, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(24, 3))

    def forward(self, embeddings: dict[str, Tensor]) -> Tensor:
        keys = embeddings["right"].detach()
        logits = embeddings["left"] @ torch.cat([keys, self.queue]).T
        if self.training:
            self.queue.copy_(torch.cat([keys, self.queue])[: len(self.queue)])
        return F.cross_entropy(logits, torch.arange(len(keys)))


def together(make: Callable[[], Any], **fields: Any) -> Callable[[], Fields]:
    """Return fields with a loss over the whole global batch."""
    forward = lambda model, batch: model(batch[0])  # noqa: E731
    return lambda: {"loss": None, "model": Encoder, "forward": forward, "global_loss": make(), **fields}


def supervised(embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Supervised contrastive loss (Khosla et al., 2020): all samples of one class belong together."""
    rows, labels = embeddings
    logits = rows @ rows.T / 0.5 - 1e4 * torch.eye(len(rows))
    same = (labels[:, None] == labels).float() - torch.eye(len(rows))
    return -(same * logits.log_softmax(1)).sum() / same.sum().clamp(min=1)


def not_ignored(batch: Any) -> int:
    """Return the number of targets that count; a slot may have none."""
    return int((batch[1] != 1).sum())


def large(batch: Any) -> int:
    return int((batch[1] > 1).sum())


VARIANTS: dict[str, Callable[[], Fields]] = {
    "l1": loss(nn.L1Loss),
    "huber": loss(lambda: nn.HuberLoss(delta=0.5)),
    "smooth_l1": loss(nn.SmoothL1Loss),
    "gaussian": loss(lambda: lambda y_pred, y: F.gaussian_nll_loss(y_pred, y, torch.ones_like(y))),
    "cross_entropy": loss(lambda: nn.CrossEntropyLoss(label_smoothing=0.1), **LABELLED),
    "cross_entropy_with_weights": loss(lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0])), **LABELLED),
    "cross_entropy_ignoring": loss(lambda: nn.CrossEntropyLoss(ignore_index=1), weight=not_ignored, **LABELLED),
    "weighted_in_four_slots": loss(nn.MSELoss, weight=large, num_slots=4),
    "weighted_in_six_slots": loss(nn.MSELoss, weight=large, num_slots=6),
    "weighted_by_nothing_at_all": loss(
        nn.MSELoss, weight=lambda batch: 0, valid_data=None, checkpoint={"every_steps": 2}
    ),
    "margin": loss(lambda: nn.MultiMarginLoss(), **LABELLED),
    "focal": loss(lambda: focal, **LABELLED),
    "hard_examples": loss(lambda: hard_examples),
    "noisy": loss(lambda: noisy),
    "summed": loss(lambda: summed),
    "unreduced": loss(lambda: unreduced),
    "an_object": loss(Regularized),
    "a_partial": loss(lambda: partial(F.huber_loss, delta=0.3)),
    "learned_scale": loss(Scaled),
    "learned_scale_in_four_slots": loss(Scaled, num_slots=4),
    "learned_centres": loss(Centres, **LABELLED),
    "learned_and_here_and_there": loss(Uncertain),
    "buffer": loss(Running),
    "dropout": loss(Dropped),
    "counts_calls": loss(Counting),
    "frozen_network": loss(Perceptual),
    "global_contrastive": together(Contrastive),
    "global_contrastive_in_four_slots": together(Contrastive, num_slots=4, precision="bf16", grad_clip_norm=0.1),
    "global_with_a_queue": together(Queued),
    "global_of_classes": lambda: {
        **LABELLED,
        "loss": None,
        "forward": lambda model, batch: (F.normalize(model(batch[0])), batch[1]),
        "global_loss": supervised,
    },
    "global_of_two_views_in_one": together(
        Contrastive, forward=lambda model, batch: {k: torch.cat([v, v]) for k, v in model(batch[0]).items()}
    ),
    "in_double": loss(
        nn.MSELoss,
        model=lambda: mlp().double(),
        train_data=lambda: points(dtype=torch.float64),
        valid_data=lambda: points(10, seed=5, dtype=torch.float64),
    ),
}
