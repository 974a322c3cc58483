"""examples/imbalanced.py in PyTorch Lightning."""

import digits
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler
from torchmetrics.classification import MulticlassAccuracy


def train_data() -> Subset:
    data = digits.train_data()
    labels = data.data.tensors[1]
    kept = (labels % 2 == 0) | (torch.arange(len(labels)) % 10 == 0)
    return Subset(data, kept.nonzero().ravel().tolist())


def balanced(data: Subset) -> torch.Tensor:
    labels = data.dataset.data.tensors[1][data.indices]
    return 1 / labels.bincount()[labels]


class Imbalanced(digits.Digits):
    def __init__(self) -> None:
        super().__init__()
        self.by_class = MulticlassAccuracy(10, average="macro")

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        super().validation_step(batch, index)
        self.by_class(self.net(batch[0]), batch[1])
        self.log("valid/by_class", self.by_class, prog_bar=True)


if __name__ == "__main__":
    L.seed_everything(7, workers=True)
    data = train_data()
    sampler = WeightedRandomSampler(balanced(data), num_samples=len(data))
    train = DataLoader(data, batch_size=96, sampler=sampler, drop_last=True)
    valid = DataLoader(digits.valid_data(), batch_size=96)
    trainer = L.Trainer(max_epochs=20, callbacks=[ModelCheckpoint("runs/imbalanced", save_last=True)])
    trainer.fit(Imbalanced(), train, valid, ckpt_path="last")
