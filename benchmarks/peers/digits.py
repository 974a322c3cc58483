"""The digits of examples/digits.py in PyTorch Lightning."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

NUM_HELD_OUT = 360


class RandomShift(Dataset):
    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.data[index]
        down, right = torch.randint(-1, 2, (2,)).tolist()
        return torch.roll(image, (down, right), dims=(1, 2)), label


def digits() -> list[torch.Tensor]:
    scans = load_digits()
    images = torch.tensor(scans.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(scans.target)
    return train_test_split(images, labels, test_size=NUM_HELD_OUT, random_state=0, stratify=labels)


def train_data() -> Dataset:
    images, _, labels, _ = digits()
    return RandomShift(TensorDataset(images, labels))


def valid_data() -> Dataset:
    _, images, _, labels = digits()
    return TensorDataset(images, labels)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 10),
    )


class Digits(L.LightningModule):
    def __init__(self, lr: float = 2e-3, num_classes: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net()
        self.loss = nn.CrossEntropyLoss()
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        loss = self.loss(self.net(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        images, labels = batch
        scores = self.net(images)
        self.accuracy(scores, labels)
        self.log("valid/loss", self.loss(scores, labels), prog_bar=True, sync_dist=True)
        self.log("valid/accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.01)
        total_steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.hparams.lr, total_steps=total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    L.seed_everything(7, workers=True)
    train = DataLoader(train_data(), batch_size=96, shuffle=True, drop_last=True)
    valid = DataLoader(valid_data(), batch_size=96)
    best = ModelCheckpoint("runs/digits", filename="best", monitor="valid/accuracy", mode="max", save_last=True)
    trainer = L.Trainer(max_epochs=20, callbacks=[best])
    trainer.fit(Digits(), train, valid, ckpt_path="last")
