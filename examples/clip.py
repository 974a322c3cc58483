"""CLIP on handwritten digits: one tower reads a scan, one its caption, and a loss over the whole batch joins them.

    torchrun --standalone --nproc-per-node 2 -m disttrain.launch examples/clip.py

`forward` gives the embeddings of one slot, `global_loss` gets those of all slots of all ranks. So a batch has as many
negatives as `global_batch_size` says, with the activations of one slot in memory. docs/contrastive.md explains it.
"""

from functools import partial

import torch
from digits import digits
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset
from torchmetrics import Metric

from disttrain import Config

CAPTIONS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LENGTH = max(map(len, CAPTIONS))


def letters(caption: str) -> torch.Tensor:
    """Return a caption as numbers, 1 for "a", filled up with zeros."""
    return torch.tensor([ord(letter) - ord("a") + 1 for letter in caption.ljust(LENGTH, "`")])


def pairs(images: torch.Tensor, labels: torch.Tensor) -> Dataset:
    return TensorDataset(images, torch.stack([letters(CAPTIONS[label]) for label in labels]))


def train_data() -> Dataset:
    images, _, labels, _ = digits()
    return pairs(images, labels)


def valid_data() -> Dataset:
    _, images, _, labels = digits()
    return pairs(images, labels)


class Towers(nn.Module):
    """An image tower and a text tower with outputs of one width."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, width)
        )
        self.text = nn.Sequential(
            nn.Embedding(27, 16),
            nn.Flatten(),
            nn.Linear(16 * LENGTH, 64),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(64, width),
        )


def forward(model: Towers, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    images, texts = batch
    return {
        "image": functional.normalize(model.image(images), dim=-1),
        "text": functional.normalize(model.text(texts), dim=-1),
        "caption": texts,
    }


class ContrastiveLoss(nn.Module):
    """Cross entropy of each image with all texts and of each text with all images, under a learned temperature.

    Several samples of a batch have the same caption; each of them is right.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([2.5]))

    def forward(self, embeddings: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = self.log_scale.exp() * embeddings["image"] @ embeddings["text"].T
        same = (embeddings["caption"][:, None] == embeddings["caption"][None]).all(-1).float()
        targets = same / same.sum(-1, keepdim=True)
        return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2


class Retrieval(Metric):
    """The share of images whose nearest text in their global batch is their caption."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, embeddings: dict[str, torch.Tensor]) -> None:
        nearest = (embeddings["image"] @ embeddings["text"].T).argmax(-1)
        self.right += (embeddings["caption"][nearest] == embeddings["caption"]).all(-1).sum()
        self.total += len(nearest)

    def compute(self) -> torch.Tensor:
        return self.right / self.total


config = Config(
    name="clip",
    seed=3,
    model=Towers,
    train_data=train_data,
    valid_data=valid_data,
    forward=forward,
    global_loss=ContrastiveLoss(),
    optimizer=partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.05),
    metrics={"retrieval": Retrieval},
    global_batch_size=96,
    num_slots=8,
    max_epochs=10,
)
