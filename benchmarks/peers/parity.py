"""parity.py of docs/starting.md in PyTorch Lightning; runs/digits/best.ckpt is that of digits.py."""

import digits
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Parity(Dataset):
    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.data[index]
        return image, label % 2


class Tuned(digits.Digits):
    def __init__(self) -> None:
        super().__init__(lr=2e-4, num_classes=2)
        self.net = digits.Digits.load_from_checkpoint("runs/digits/best.ckpt").net
        self.net[11] = nn.Linear(64 * 4 * 4, 2)


if __name__ == "__main__":
    L.seed_everything(7, workers=True)
    train = DataLoader(Parity(digits.train_data()), batch_size=96, shuffle=True, drop_last=True)
    valid = DataLoader(Parity(digits.valid_data()), batch_size=96)
    trainer = L.Trainer(max_epochs=3, callbacks=[ModelCheckpoint("runs/parity", save_last=True)])
    trainer.fit(Tuned(), train, valid, ckpt_path="last")
