"""Handwritten digits of which the odd ones are rare: each class is drawn as often as any other.

python -m disttrain.launch examples/imbalanced.py
"""

from functools import partial

import digits
import torch
from torch.utils.data import Subset
from torchmetrics.classification import MulticlassAccuracy

from disttrain.config import replace
from disttrain.data import Weighted


def train_data() -> Subset:
    data = digits.train_data()
    labels = data.data.tensors[1]
    kept = (labels % 2 == 0) | (torch.arange(len(labels)) % 10 == 0)
    return Subset(data, kept.nonzero().ravel().tolist())


def balanced(data: Subset) -> torch.Tensor:
    labels = data.dataset.data.tensors[1][data.indices]
    return 1 / labels.bincount()[labels]


config = replace(
    digits.config,
    name="imbalanced",
    train_data=train_data,
    order=partial(Weighted, weights=balanced),
    metrics=digits.config.metrics | {"by_class": partial(MulticlassAccuracy, num_classes=10, average="macro")},
)
