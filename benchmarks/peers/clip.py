"""examples/clip.py in PyTorch Lightning."""

import lightning as L
import torch
from digits import digits
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import Metric

CAPTIONS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LENGTH = max(map(len, CAPTIONS))


def letters(caption: str) -> torch.Tensor:
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


class ContrastiveLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([2.5]))

    def forward(self, embeddings: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = self.log_scale.exp() * embeddings["image"] @ embeddings["text"].T
        same = (embeddings["caption"][:, None] == embeddings["caption"][None]).all(-1).float()
        targets = same / same.sum(-1, keepdim=True)
        return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2


class Retrieval(Metric):
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


class Clip(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.towers, self.loss, self.retrieval = Towers(), ContrastiveLoss(), Retrieval()

    def embeddings(self, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        images, texts = batch
        mine = {
            "image": functional.normalize(self.towers.image(images), dim=-1),
            "text": functional.normalize(self.towers.text(texts), dim=-1),
            "caption": texts,
        }
        if self.trainer.world_size == 1:
            return mine
        return {name: each.flatten(0, 1) for name, each in self.all_gather(mine, sync_grads=True).items()}

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        loss = self.loss(self.embeddings(batch))
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        embeddings = self.embeddings(batch)
        self.retrieval(embeddings)
        self.log("valid/loss", self.loss(embeddings), prog_bar=True, sync_dist=True)
        self.log("valid/retrieval", self.retrieval, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.05)


if __name__ == "__main__":
    L.seed_everything(3, workers=True)
    train = DataLoader(train_data(), batch_size=96, shuffle=True, drop_last=True)
    valid = DataLoader(valid_data(), batch_size=96)
    trainer = L.Trainer(max_epochs=10, callbacks=[ModelCheckpoint("runs/clip", save_last=True)])
    trainer.fit(Clip(), train, valid, ckpt_path="last")
