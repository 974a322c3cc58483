"""Distillation: a small network of the digits learns from the scores of a larger one, which stays as it is.

    python -m disttrain.launch examples/digits.py name=base checkpoint.monitor=accuracy
    python -m disttrain.launch examples/distill.py

The teacher begins with the best weights of the first run. It is frozen, and no checkpoint holds it.
"""

from functools import partial

import digits
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torchmetrics.classification import MulticlassAccuracy

from disttrain import Config

TEMPERATURE = 3.0


class Pair(nn.Module):
    """A student that is trained, and the teacher, frozen and always in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = digits.net().requires_grad_(False)
        self.student = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 10))

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.teacher.eval()
        return self


def forward(model: Pair, batch: list[Tensor]) -> tuple:
    images, labels = batch
    scores = model.student(images)
    soft, taught = ((each / TEMPERATURE).log_softmax(-1) for each in (scores, model.teacher(images)))
    kl = kl_div(soft, taught, reduction="batchmean", log_target=True) * TEMPERATURE**2
    ce = cross_entropy(scores, labels)
    return 0.7 * kl + 0.3 * ce, (scores, labels), {"kl": kl, "ce": ce}


config = Config(
    name="distill",
    seed=7,
    model=Pair,
    init_from={"path": "runs/base@best", "rename": {"": "teacher."}, "skip": "student."},
    train_data=digits.train_data,
    valid_data=digits.valid_data,
    forward=forward,
    optimizer=partial(torch.optim.AdamW, lr=2e-3),
    metrics={"accuracy": partial(MulticlassAccuracy, num_classes=10, average="micro")},
    global_batch_size=96,
    num_slots=8,
    max_epochs=30,
    checkpoint={"leave_out_frozen": True},
)
